"""What a guard is asked, and how its answer is taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from llama_stack.apis.inference import (
    CompletionMessage,
    OpenAIAssistantMessageParam,
    OpenAIUserMessageParam,
    StopReason,
    SystemMessage,
    ToolCall,
    ToolResponseMessage,
    UserMessage,
)
from llama_stack.apis.safety import SafetyViolation
from llama_stack.apis.shields import Shield
from llama_stack.providers.datatypes import Api
from llama_stack.providers.inline.safety.llama_guard.config import LlamaGuardConfig

from app.stack.chunks import ModelError
from app.stack.safety import LlamaGuard, verdict


@pytest.mark.parametrize(
    ("answer", "categories"),
    [
        ("safe", None),
        ("\n\nSafe\n", None),
        ("unsafe", []),
        ("unsafe\nS1", ["S1"]),
        ("\n\nunsafe\r\nS1, S14\n", ["S1", "S14"]),
        ("Unsafe S2", ["S2"]),
        ("unsafe\n\nS1\nS2", ["S1", "S2"]),
        ("unsafe\nsomething else", []),
    ],
)
def test_a_verdict_is_read_however_it_is_spaced(answer: str, categories: list[str] | None) -> None:
    """Unsafe needs no category."""
    assert verdict(answer) == categories


@pytest.mark.parametrize("answer", ["", "safety first", "safe\nS1", "It is safe.", "I cannot help", "un safe"])
def test_what_is_no_verdict_is_never_safe(answer: str) -> None:
    """The error shows the beginning of the answer."""
    with pytest.raises(ModelError, match="neither safe nor unsafe"):
        verdict(answer)


class Guard:
    """`inference` of a stack, whose one model is a guard that gives this answer, and remembers what it was asked."""

    def __init__(self, answer: str) -> None:
        self._answer = answer
        self.requests: list[Any] = []

    async def openai_chat_completion(self, request: Any) -> Any:
        self.requests.append(request)
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=self._answer))])

    @property
    def conversation(self) -> str:
        """What stands in the one request's prompt as the conversation."""
        [request] = self.requests
        prompt: str = request.messages[0].content
        return prompt.partition("<BEGIN CONVERSATION>\n\n")[2].partition("\n\n<END CONVERSATION>")[0]


async def judged(guard: Guard, messages: list[Any], excluded: tuple[str, ...] = ()) -> SafetyViolation | None:
    async def get_shield(shield_id: str) -> Shield:
        return Shield(identifier=shield_id, provider_resource_id="guard", provider_id="llama-guard")

    provider = LlamaGuard(LlamaGuardConfig(excluded_categories=list(excluded)), {Api.inference: guard})
    provider.shield_store = SimpleNamespace(get_shield=get_shield)
    return (await provider.run_shield("shield", messages)).violation


async def test_messages_of_one_role_are_one_message() -> None:
    """The guard judges the last message only: all that the user says in a turn is that."""
    guard = Guard("safe")
    asked = [SystemMessage(content="Be kind."), UserMessage(content="poison"), UserMessage(content="please")]
    assert await judged(guard, asked) is None
    assert guard.conversation == "User: poison\nplease"


async def test_calls_are_seen() -> None:
    """Llama Stack's, and OpenAI's."""
    call = ToolCall(call_id="c", tool_name="brave_search", arguments='{"query": "x"}')
    openai = {"id": "c", "type": "function", "function": {"name": "search", "arguments": "{}"}}
    theirs = OpenAIAssistantMessageParam(content=None, tool_calls=[openai])
    ours = CompletionMessage(content="", stop_reason=StopReason.end_of_message, tool_calls=[call])
    guard = Guard("safe")
    answer = ToolResponseMessage(call_id="c", content="found")
    await judged(guard, [OpenAIUserMessageParam(content="hi"), theirs, UserMessage(content="more"), ours, answer])
    said = ["User: hi", "Assistant: search({})", "User: more", 'Assistant: brave_search({"query": "x"})', "Tool: found"]
    assert guard.conversation == "\n\n".join(said)


@pytest.mark.parametrize(
    ("answer", "violated"),
    [("unsafe\nS1", False), ("unsafe\nS1, S2", False), ("unsafe\nS1,S3", True), ("unsafe", True)],
)
async def test_excluded_categories_are_no_violation(answer: str, violated: bool) -> None:
    """Unless another is violated, or the guard names none; and the guard is not asked about them."""
    guard = Guard(answer)
    assert bool(await judged(guard, [UserMessage(content="hi")], ("S1", "S2"))) == violated
    assert "S2: " not in guard.requests[0].messages[0].content


async def test_nothing_cannot_be_judged() -> None:
    """It is the request that is wrong."""
    with pytest.raises(ValueError, match="must not be empty"):
        await judged(Guard("safe"), [])
