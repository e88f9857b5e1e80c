"""Llama Guard on any model of the stack: llama_stack's `inline::llama-guard`, made safe to rely on.

The prompt and the categories are the original's. What differs:

- An answer that begins with `unsafe` is a violation, with categories or without, however they are spaced; the original
  takes `unsafe` alone and `unsafe\\r\\nS1` for errors. What is neither that nor `safe` is an error, never safe: the
  original's moderations let `safely…` pass, and every category that it does not know.
- A guard judges the last message only. Messages of one role that follow each other are therefore one message (the
  original drops the first of two, and lets all but the last pass), and each text to moderate is asked about by itself.
- The guard sees the calls in a message, and the images in the one that it judges; the original shows it nothing of a
  call, and `<image>`. A guard that takes no images refuses the request, and nothing passes.
- Instructions are not part of what is judged, as in the original, which turns them into a user's message for that.
- A shield needs a model that the stack knows, when it is registered.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from llama_stack.apis.common.content_types import ImageContentItem
from llama_stack.apis.inference import (
    OpenAIChatCompletionContentPartImageParam,
    OpenAIChatCompletionContentPartTextParam,
    OpenAIChatCompletionRequestWithExtraBody,
    OpenAIImageURL,
    OpenAIUserMessageParam,
)
from llama_stack.apis.models import ModelType
from llama_stack.apis.safety import RunShieldResponse, SafetyViolation, ViolationLevel
from llama_stack.apis.safety.safety import ModerationObject, ModerationObjectResults
from llama_stack.apis.shields import Shield
from llama_stack.providers.datatypes import Api
from llama_stack.providers.inline.safety.llama_guard import llama_guard as original
from llama_stack.providers.inline.safety.llama_guard.config import LlamaGuardConfig
from llama_stack.providers.utils.inference.prompt_adapter import (
    convert_image_content_to_url,
    interleaved_content_as_str,
)

from app.stack.chunks import ModelError

_UNSAFE = re.compile(r"unsafe\b", re.IGNORECASE)
_CATEGORY = re.compile(r"\bS\d+\b")
_SHOWN_OF_AN_ANSWER = 200
# The original's, for a guard that it does not know.
_CATEGORIES = [*original.DEFAULT_LG_V3_SAFETY_CATEGORIES, original.CAT_CODE_INTERPRETER_ABUSE]


class LlamaGuard(original.LlamaGuardSafetyImpl):
    """`safety` of a Llama Stack. `provider_resource_id` of its shields is the guard's model."""

    async def register_shield(self, shield: Shield) -> None:
        """Raises ValueError: the stack does not know the guard's model."""
        model = shield.provider_resource_id
        try:
            await self.inference_api._get_model_provider(model, ModelType.llm)
        except ValueError as error:
            hint = "Name the guard's model in INFERENCE_MODEL, or register it."
            raise ValueError(f"provider_shield_id: {error} {hint}") from error

    async def run_shield(
        self, shield_id: str, messages: Sequence[Any], params: dict[str, Any] | None = None
    ) -> RunShieldResponse:
        """Whether the last message is safe; messages are llama_stack's, or OpenAI's.

        Raises ModelError: the guard fails, or gives no verdict.
        """
        shield = await self.shield_store.get_shield(shield_id)
        codes = await self._violated(shield.provider_resource_id, messages)
        if codes is None:
            return RunShieldResponse(violation=None)
        violation = SafetyViolation(
            violation_level=ViolationLevel.ERROR,
            user_message=original.CANNED_RESPONSE_TEXT,
            metadata={"violation_type": ",".join(codes)},
        )
        return RunShieldResponse(violation=violation)

    async def run_moderation(self, input: str | list[str], model: str) -> ModerationObject:
        """Raises ModelError: the guard fails, or gives no verdict."""
        texts = [input] if isinstance(input, str) else input
        results = [_moderated(await self._violated(model, [OpenAIUserMessageParam(content=text)])) for text in texts]
        return ModerationObject(id=f"modr-{uuid.uuid4()}", model=model, results=results)

    async def _violated(self, model: str, messages: Sequence[Any]) -> list[str] | None:
        """The categories violated by the last message; None: it is safe."""
        shield = original.LlamaGuardShield(model, self.inference_api, self.config.excluded_categories, _of(model))
        request = OpenAIChatCompletionRequestWithExtraBody(
            model=model, messages=[await _prompt(shield, messages)], stream=False, temperature=0.0
        )
        answer = await self.inference_api.openai_chat_completion(request)
        codes = verdict(interleaved_content_as_str(answer.choices[0].message.content) if answer.choices else "")
        excluded = set(self.config.excluded_categories)
        return None if codes and excluded.issuperset(codes) else codes


def verdict(answer: str) -> list[str] | None:
    """The categories that a guard names as violated; None: it says `safe`. Raises ModelError: it says neither."""
    text = answer.strip()
    if text.lower() == original.SAFE_RESPONSE:
        return None
    if _UNSAFE.match(text):
        return _CATEGORY.findall(text)
    raise ModelError(f"The guard answered neither safe nor unsafe: {text[:_SHOWN_OF_AN_ANSWER]!r}")


def _of(model: str) -> list[str]:
    """The names of the categories that a guard knows."""
    known: list[str] = original.MODEL_TO_SAFETY_CATEGORIES_MAP.get(
        original.LLAMA_GUARD_MODEL_IDS.get(model), _CATEGORIES
    )
    return known


async def _prompt(shield: Any, messages: Sequence[Any]) -> OpenAIUserMessageParam:
    """Llama Guard's question, and the images of the message that it is about."""
    said = [message for message in messages if message.role not in ("system", "developer")] or list(messages)
    if not said:
        raise ValueError("Messages must not be empty")
    spoken = [(role, list(group)) for role, group in groupby(said, key=lambda message: str(message.role))]
    spoken[0] = ("user", spoken[0][1])  # Llama Guard's conversations begin with one
    text = original.PROMPT_TEMPLATE.substitute(
        agent_type=spoken[-1][0].capitalize(),
        categories="\n".join(shield.get_safety_categories()),
        conversations="\n\n".join(f"{role.capitalize()}: {_text(group)}" for role, group in spoken),
    )
    images = [part for message in spoken[-1][1] for part in await _images(message.content)]
    return OpenAIUserMessageParam(
        content=[OpenAIChatCompletionContentPartTextParam(text=text), *images] if images else text
    )


def _text(messages: Sequence[Any]) -> str:
    """What they say and which calls they make, a line each."""
    lines = []
    for message in messages:
        lines.append(interleaved_content_as_str(message.content))
        lines += [_call(call) for call in getattr(message, "tool_calls", None) or ()]
    return "\n".join(line for line in lines if line)


def _call(call: Any) -> str:
    """As `name(arguments)`, of llama_stack's and of OpenAI's."""
    if function := getattr(call, "function", None):
        return f"{function.name}({function.arguments})"
    return f"{getattr(call.tool_name, 'value', call.tool_name)}({call.arguments})"


async def _images(content: Any) -> list[OpenAIChatCompletionContentPartImageParam]:
    found = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, OpenAIChatCompletionContentPartImageParam):
            found.append(part)
        elif isinstance(part, ImageContentItem):
            url = OpenAIImageURL(url=await convert_image_content_to_url(part))
            found.append(OpenAIChatCompletionContentPartImageParam(image_url=url))
    return found


def _moderated(codes: list[str] | None) -> ModerationObjectResults:
    names = {original.SAFETY_CODE_TO_CATEGORIES_MAP.get(code) for code in codes or ()}
    categories = {name: name in names for name in original.SAFETY_CATEGORIES_TO_CODE_MAP}
    return ModerationObjectResults(
        flagged=codes is not None,
        categories=categories,
        category_applied_input_types={name: ["text"] if hit else [] for name, hit in categories.items()},
        category_scores={name: float(hit) for name, hit in categories.items()},
        user_message=None if codes is None else original.CANNED_RESPONSE_TEXT,
        metadata={} if codes is None else {"violation_type": codes},
    )


async def get_provider_impl(config: LlamaGuardConfig, deps: dict[Api, Any]) -> LlamaGuard:
    return LlamaGuard(config, deps)
