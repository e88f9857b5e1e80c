"""The code interpreter of one attempt at a turn: runs code in the session's folder, and tells what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from llama_stack.apis.tools import ToolInvocationResult

from app.domain import attachments
from app.store.session_files import Changes
from tasks.tools.sandbox import MAX_FILES, Broken, Limits, Ran, Sandbox, Unsandboxed

MAX_ATTACHMENTS = 50


class CodeInterpreter:
    """Calls are made under `in_order`, one after the other, each recorded before the next: they share a folder.

    `load`: the folder as it is recorded. `turn_path`: where the turn's attachments are fetched.
    """

    def __init__(self, sandbox: Sandbox, load: Callable[[], Awaitable[dict[str, bytes]]], turn_path: str) -> None:
        self._sandbox = sandbox
        self._load = load
        self._turn_path = turn_path
        self.in_order = asyncio.Lock()
        self._changes: Changes = {}

    def take_changes(self) -> Changes:
        """What the last call left, to be recorded with its result; once."""
        taken, self._changes = self._changes, {}
        return taken

    async def run(self, arguments: Mapping[str, Any]) -> ToolInvocationResult:
        """Makes one call. Raises what `load` raises."""
        code = arguments.get("code")
        if not isinstance(code, str):
            return _failed("The argument `code` is missing: give the Python code, as text.")
        try:
            async with self._sandbox.places:  # so that only so many folders are in memory
                before = await self._load()
                ran = await self._sandbox.run(code, before)
        except Unsandboxed as missing:
            return _failed(f"The code interpreter cannot be used. {missing}")
        except Broken as broken:
            return _failed(f"error: {broken} What the code left is not kept.")
        if ran.ended not in ("files_bytes", "max_files"):  # with which nothing is kept
            self._changes = _changes(before, ran.files)
        made = [name for name, content in self._changes.items() if content is not None and _shown(name)]
        text = _text(ran, made, self._sandbox.limits)
        listed = [attachments.attachment(self._turn_path, name) for name in made[:MAX_ATTACHMENTS]]
        return ToolInvocationResult(content=text, metadata={attachments.METADATA: listed} if listed else None)


def _failed(message: str) -> ToolInvocationResult:
    return ToolInvocationResult(content=message, error_code=1, metadata={"error": True})


def _changes(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> dict[str, bytes | None]:
    gone: dict[str, bytes | None] = dict.fromkeys(before.keys() - after.keys())
    return {name: content for name, content in after.items() if before.get(name) != content} | gone


def _shown(name: str) -> bool:
    """Not what is hidden, nor what Python leaves behind."""
    return not any(part.startswith((".", "__pycache__")) for part in name.split("/"))


def _text(ran: Ran, made: list[str], limits: Limits) -> str:
    """What the model is told, in the form that Llama Stack's code interpreter had."""
    pieces = [_status(ran.ended, limits)]
    for name, said in (("stdout", ran.stdout), ("stderr", ran.stderr)):
        if said:
            pieces += [f"[{name}]", said.removesuffix("\n"), f"[/{name}]"]
    if made:
        pieces.append(f"Files made or changed, which the user is shown: {_names(made)}")
    if ran.left_out:
        pieces.append(f"Not kept, since they are no plain files or have odd names: {', '.join(ran.left_out)}")
    return "\n".join(pieces)


def _names(made: list[str]) -> str:
    more = len(made) - MAX_ATTACHMENTS
    return ", ".join(made[:MAX_ATTACHMENTS]) + (f", and {more} more that are not shown" if more > 0 else "")


def _status(ended: str, limits: Limits) -> str:
    if ended == "exit 0":
        return "completed"
    reasons = {
        "seconds": f"it was stopped after {limits.seconds:g} s (SANDBOX_TIMEOUT_SECONDS)",
        "max_files": f"nothing of the folder is kept: it made more than {MAX_FILES} files and folders",
        "files_bytes": f"nothing of the folder is kept: its files have more than {limits.files_bytes} bytes "
        "(SANDBOX_FILES_MAX_BYTES)",
    }
    return f"error: {reasons.get(ended) or f'it ended with {ended}'}"
