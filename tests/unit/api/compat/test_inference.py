"""The inference API of 0.1 and 0.2 in OpenAI's terms, and back."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.api.compat.inference import CompletionChunks, completion_answer, embeddings_answer
from app.api.compat.openai import ChatChunks, ChatCompletion, chat_answer, chat_request, text
from app.domain.errors import CompletionError, InvalidRequest

USER = {"role": "user", "content": "hi"}


def request(**fields: Any) -> dict[str, Any]:
    return chat_request(ChatCompletion.model_validate({"model_id": "m", "messages": [USER], **fields}))


def test_what_was_not_asked_for_is_not_sent() -> None:
    """The model server's own defaults hold."""
    assert request() == {"model": "m", "stream": False, "messages": [USER]}


def test_all_messages_of_a_conversation() -> None:
    """Calls with their arguments as an object, and tool responses."""
    call = {"call_id": "c", "tool_name": "add", "arguments": {"a": 1}, "arguments_json": '{"a": 1}'}
    messages = [
        {"role": "system", "content": "be kind"},
        USER,
        {"role": "assistant", "content": "", "stop_reason": "end_of_turn", "tool_calls": [call]},
        {"role": "tool", "call_id": "c", "content": "2", "tool_name": "add"},
    ]
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert request(messages=messages)["messages"] == [
        {"role": "system", "content": "be kind"},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "content": "2", "tool_call_id": "c"},
    ]


def test_images_and_context_become_parts() -> None:
    """A URL as it is, data with the type that their first characters tell."""
    items = [
        {"type": "text", "text": "see"},
        {"type": "image", "image": {"url": {"uri": "https://a/b.png"}}},
        {"type": "image", "image": {"data": "/9j/4AAQ"}},
    ]
    content = request(messages=[{"role": "user", "content": items, "context": "known"}])["messages"][0]["content"]
    assert content == [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": "https://a/b.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9j/4AAQ"}},
        {"type": "text", "text": "known"},
    ]


@pytest.mark.parametrize(
    ("sampling", "sent"),
    [
        ({"strategy": {"type": "greedy"}, "max_tokens": 0}, {"temperature": 0.0}),
        (
            {"strategy": {"type": "top_p", "temperature": 0.5, "top_p": 0.9}, "max_tokens": 7, "stop": ["x"]},
            {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "stop": ["x"]},
        ),
        (
            {"strategy": {"type": "top_k", "top_k": 3}, "repetition_penalty": 1.2},
            {"top_k": 3, "repetition_penalty": 1.2},
        ),
    ],
)
def test_sampling(sampling: dict[str, Any], sent: dict[str, Any]) -> None:
    """`max_tokens` of 0 means none."""
    assert request(sampling_params=sampling) == request() | sent


def test_tools_have_schemas() -> None:
    """`param_type` of old; 0.3's `input_schema` goes first; the choice is sent with tools only."""
    old = {"tool_name": "add", "description": "d", "parameters": {"a": {"param_type": "int", "required": True}}}
    sent = request(tools=[old, {"tool_name": "b", "input_schema": {"type": "object"}}], tool_choice="required")
    assert [tool["function"] for tool in sent["tools"]] == [
        {
            "name": "add",
            "description": "d",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
        {"name": "b", "description": "", "parameters": {"type": "object"}},
    ]
    assert sent["tool_choice"] == "required"
    named = request(tools=[old], tool_config={"tool_choice": "add"})
    assert named["tool_choice"] == {"type": "function", "function": {"name": "add"}}
    assert "tool_choice" not in request(tool_choice="required")


def test_formats_and_log_probabilities() -> None:
    """A JSON Schema gets the name that OpenAI wants; a grammar is refused."""
    sent = request(response_format={"type": "json_schema", "json_schema": {"type": "object"}}, logprobs={"top_k": 2})
    assert sent["response_format"]["json_schema"] == {"name": "response", "schema": {"type": "object"}}
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, 2)
    with pytest.raises(InvalidRequest, match="grammar"):
        request(response_format={"type": "grammar", "bnf": {}})


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []},
        {"messages": [{"role": "bogus"}]},
        {"messages": ["x"]},
        {"model_id": None},
        {"messages": [{"role": "assistant", "content": "", "stop_reason": "end_of_turn", "tool_calls": 5}]},
    ],
)
def test_a_wrong_body_is_refused(wrong: dict[str, Any]) -> None:
    """By the field."""
    with pytest.raises(ValidationError):
        request(**wrong)


CALLS = [{"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}]
OLD_CALL = {"call_id": "c", "tool_name": "add", "arguments": {"a": 1}, "arguments_json": '{"a":1}'}


def test_an_answer_with_text_and_one_with_calls() -> None:
    """Stop reasons have their old names."""
    told = {"message": {"role": "assistant", "content": "yes"}, "finish_reason": "length"}
    assert chat_answer({"choices": [told]})["completion_message"] == {
        "role": "assistant",
        "content": "yes",
        "stop_reason": "out_of_tokens",
        "tool_calls": [],
    }
    called = {"message": {"role": "assistant", "content": None, "tool_calls": CALLS}, "finish_reason": "tool_calls"}
    message = chat_answer({"choices": [called]})["completion_message"]
    assert (message["content"], message["tool_calls"], message["stop_reason"]) == ("", [OLD_CALL], "end_of_message")


def test_log_probabilities_are_told_by_token() -> None:
    """The token itself where no others were asked for."""
    tokens = [
        {"token": "a", "logprob": -1.0, "top_logprobs": []},
        {"token": "b", "logprob": -2.0, "top_logprobs": [{"token": "b", "logprob": -2.0}]},
    ]
    choice = {"message": {"content": "ab"}, "finish_reason": "stop", "logprobs": {"content": tokens}}
    told = chat_answer({"choices": [choice]})["logprobs"]
    assert told == [{"logprobs_by_token": {"a": -1.0}}, {"logprobs_by_token": {"b": -2.0}}]


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def stream(chunks: Any, *given: dict[str, Any]) -> list[dict[str, Any]]:
    return [told for each in given for told in chunks.of(each)] + list(chunks.end())


def test_a_stream_of_text() -> None:
    """Start, progress, complete with the reason; usage and empty deltas say nothing."""
    told = stream(
        ChatChunks(),
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "a "}),
        chunk({"content": "b"}),
        chunk({}, "stop"),
        {"choices": [], "usage": {"total_tokens": 3}},
    )
    assert [(each["event"]["event_type"], each["event"]["delta"]["text"]) for each in told] == [
        ("start", ""),
        ("progress", "a "),
        ("progress", "b"),
        ("complete", ""),
    ]
    assert [each["event"]["stop_reason"] for each in told] == [None, None, None, "end_of_turn"]


def test_a_stream_with_tool_calls() -> None:
    """Each call comes whole, once its pieces are together, as 0.2's servers sent it."""
    told = stream(
        ChatChunks(),
        chunk({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "add", "arguments": ""}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]}),
        chunk({}, "tool_calls"),
    )
    assert told[1]["event"]["delta"] == {"type": "tool_call", "tool_call": OLD_CALL, "parse_status": "succeeded"}
    assert [each["event"]["stop_reason"] for each in told] == [None, None, "end_of_message"]


@pytest.mark.parametrize("index", [0, None])
def test_calls_of_one_index_are_told_apart_by_their_ids(index: int | None) -> None:
    """Some servers give all calls the same one, or none; some repeat the name with each piece."""
    pieces = [("a", "add", '{"a"'), ("a", "add", ":1}"), ("b", "add", '{"a":2}')]
    told = stream(
        ChatChunks(),
        *(
            chunk({"tool_calls": [{"index": index, "id": i, "function": {"name": n, "arguments": a}}]})
            for i, n, a in pieces
        ),
        chunk({}, "tool_calls"),
    )
    calls = [each["event"]["delta"]["tool_call"] for each in told[1:-1]]
    assert [(call["call_id"], call["tool_name"], call["arguments"]) for call in calls] == [
        ("a", "add", {"a": 1}),
        ("b", "add", {"a": 2}),
    ]


@pytest.mark.parametrize("given", [{}, {"choices": None}, {"choices": []}, {"choices": "x"}, {"choices": ["x"]}])
def test_what_is_no_completion_is_the_model_servers_fault(given: dict[str, Any]) -> None:
    """Whole; a chunk without a choice says nothing."""
    for answer in (chat_answer, completion_answer, embeddings_answer):
        with pytest.raises(CompletionError) as raised:
            answer(given)
        assert raised.value.status == 502
    assert [each["event"]["event_type"] for each in stream(ChatChunks(), given)] == ["start", "complete"]
    assert [each["delta"] for each in stream(CompletionChunks(), given)] == [""]


def test_what_servers_leave_out_is_empty() -> None:
    """As the openai SDK has it; arguments that came as an object are its text."""
    assert chat_answer({"choices": [{"message": None}]})["completion_message"]["content"] == ""
    assert completion_answer({"choices": [{}]})["content"] == ""
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    told = {**OLD_CALL, "call_id": "", "arguments_json": '{"a": 1}'}
    assert chat_answer({"choices": [{"message": {"tool_calls": calls}}]})["completion_message"]["tool_calls"] == [told]
    assert stream(ChatChunks(), chunk({"tool_calls": calls}))[1]["event"]["delta"]["tool_call"] == told


def test_a_stream_that_fails_is_not_complete() -> None:
    """The error is the last that is told."""
    error = {"error": {"message": "broke"}}
    assert stream(ChatChunks(), chunk({"content": "a"}), error)[-1] == error
    assert stream(CompletionChunks(), error) == [error]


def test_completions_and_embeddings() -> None:
    """Whole and streamed."""
    assert completion_answer({"choices": [{"text": "t", "finish_reason": "length"}]}) == {
        "content": "t",
        "stop_reason": "out_of_tokens",
        "logprobs": None,
    }
    told = stream(
        CompletionChunks(), {"choices": [{"text": "t"}]}, {"choices": [{"text": "", "finish_reason": "stop"}]}
    )
    assert [(each["delta"], each["stop_reason"]) for each in told] == [("t", None), ("", "end_of_turn")]
    assert embeddings_answer({"data": [{"embedding": [1.0]}]}) == {"embeddings": [[1.0]]}


def test_text_is_all_that_completions_and_embeddings_take() -> None:
    """An image is refused, and the field is named."""
    embedded = ChatCompletion.model_validate(
        {"model_id": "m", "messages": [{"role": "user", "content": {"type": "image", "image": {"data": "x"}}}]}
    )
    with pytest.raises(InvalidRequest, match=r"contents\.0"):
        text("contents.0", embedded.messages[0].content)
