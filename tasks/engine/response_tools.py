"""The tools of a response: what the model is offered, whose a call is, and one call of one of ours."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_stack.providers.inline.agents.meta_reference.responses.utils import _extract_citations_from_text
from llama_stack.providers.utils.inference.prompt_adapter import interleaved_content_as_str

from app.domain.arguments import parsed
from app.domain.errors import TurnFailure
from app.domain.responses.context import SEARCH, WEB_SEARCH
from app.domain.responses.steps import (
    Call,
    IndexedItem,
    InferenceStep,
    Item,
    ListStep,
    Step,
    ToolStep,
    unfinished,
)
from app.identity.secrets import Secrets
from app.store.claims import Claim
from tasks.engine import mcp
from tasks.engine.attempt import Tools
from tasks.engine.mcp import Connections
from tasks.engine.mcp_wire import Unauthorized
from tasks.engine.responding import CallItem, CallKind
from tasks.engine.tools import OUTCOME_UNKNOWN

logger = logging.getLogger(__name__)

WEB_SEARCH_GROUP = "builtin::websearch"
_SEARCH_TOOL = {
    "name": SEARCH,
    "description": "Search for information in the user's files.",
    "parameters": {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "What to search for, in a few words or a sentence."}},
        "required": ["query"],
    },
}
_WEB_SEARCH_TOOL = {
    "name": WEB_SEARCH,
    "description": "Search the web for information.",
    "parameters": {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "What to search for."}},
        "required": ["query"],
    },
}
_CITE = "Cite sources at the end of sentences before punctuation, as `<|file-id|>`. Use only the file ids given."


@dataclass(frozen=True)
class Listed:
    """An MCP server's tools as an `mcp_list_tools` item shows them, and their annotations by name."""

    tools: list[dict[str, Any]]
    annotations: dict[str, dict[str, Any]]


class ResponseTools:
    """Of one attempt; looks at its journal as that grows.

    Raises TurnFailure: two tools have one name.
    """

    def __init__(
        self, given: Tools, claim: Claim, journal: Sequence[Step], secrets: Secrets, connections: Connections
    ) -> None:
        self._given = given
        self._secrets = secrets
        self._mcp = connections
        self._settings = given.settings
        self._journal = journal
        self._request = claim.request
        self._tools: list[dict[str, Any]] = claim.request.get("tools") or []
        self._functions = {tool["name"]: tool for tool in self._tools if tool["type"] == "function"}
        self._file_search = next((tool for tool in self._tools if tool["type"] == "file_search"), None)
        self._web_search = next((tool for tool in self._tools if tool["type"].startswith("web_search")), None)
        self._owner_of_server = {tool["server_label"]: tool for tool in self._tools if tool["type"] == "mcp"}

    # --- what is offered ---

    def offered(self) -> list[dict[str, Any]]:
        """The functions, as the model is told of them."""
        functions = [_function(tool) for tool in self._functions.values()]
        functions += [_function(tool) for _, tool in self._mcp_tools().values()]
        functions += [_SEARCH_TOOL] if self._file_search else []
        functions += [_WEB_SEARCH_TOOL] if self._web_search else []
        names = [function["name"] for function in functions]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise TurnFailure("invalid_request", f"tools: {', '.join(sorted(twice))} is offered twice")
        allowed = self._allowed_names()
        return [
            {"type": "function", "function": each} for each in functions if allowed is None or each["name"] in allowed
        ]

    def choice(self) -> Any:
        """`tool_choice` in the chat completions' spelling.

        A tool that is forced is forced once: a model that had to call one again and again would never answer.
        """
        choice = self._request.get("tool_choice") or "auto"
        if choice != "none" and any(isinstance(step, InferenceStep) for step in self._journal):
            return "auto"
        if isinstance(choice, str):
            return choice
        if choice["type"] == "allowed_tools":
            return choice.get("mode") or "auto"
        if choice["type"] == "file_search":
            return {"type": "function", "function": {"name": SEARCH}}
        if choice["type"].startswith("web_search"):
            return {"type": "function", "function": {"name": WEB_SEARCH}}
        if choice.get("name"):
            return {"type": "function", "function": {"name": choice["name"]}}
        return "required"  # any tool of an MCP server: no others are offered

    def _allowed_names(self) -> set[str] | None:
        """The functions that `tool_choice` leaves; None: all."""
        choice = self._request.get("tool_choice")
        if not isinstance(choice, dict):
            return None
        if choice["type"] == "allowed_tools":
            return {name for tool in choice["tools"] for name in self._names_of(tool)}
        forces_any = choice["type"] == "mcp" and not choice.get("name") and self.choice() == "required"
        return self._names_of(choice) if forces_any else None

    def _names_of(self, tool: Mapping[str, Any]) -> set[str]:
        """The functions that stand for a tool before the model."""
        if tool["type"] == "file_search":
            return {SEARCH}
        if tool["type"].startswith("web_search"):
            return {WEB_SEARCH}
        if tool.get("name"):
            return {tool["name"]}
        label = tool.get("server_label")
        return {name for name, (server, _) in self._mcp_tools().items() if server["server_label"] == label}

    def kind_of(self, name: str) -> CallKind:
        """Whose a call is: a name that nobody offered is taken for a function of the client's."""
        if name in self._functions:
            return "function"
        if name == SEARCH and self._file_search:
            return "file_search"
        if name == WEB_SEARCH and self._web_search:
            return "web_search"
        found = self._mcp_tools().get(name)
        if found is None:
            return "function"
        return "approval" if _needs_approval(found[0], name, self._annotations(name)) else "mcp"

    def _mcp_tools(self) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        """By name: (the request's MCP tool, the server's tool as it is listed)."""
        found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        for step in self._journal:
            if isinstance(step, ListStep):
                server = self._tools[step.tool_index]
                for tool in step.items[0].item["tools"]:
                    if tool["name"] in found:
                        message = f"tools: {tool['name']} is offered by two MCP servers"
                        raise TurnFailure("invalid_request", message)
                    found[tool["name"]] = (server, tool)
        return found

    def _annotations(self, name: str) -> dict[str, Any]:
        for step in self._journal:
            if isinstance(step, ListStep) and name in step.annotations:
                return step.annotations[name]
        return {}

    async def list_tools(self, tool_index: int) -> Listed:
        """Raises TurnFailure: the server cannot be used."""
        tool = self._tools[tool_index]
        try:
            listed = await self._mcp.list_tools(self._server(tool))
        except Exception as error:
            said = self._secrets.hide(_words(error))
            message = f"tools[{tool_index}]: the MCP server {tool['server_label']} cannot be used: {said}"
            raise TurnFailure("invalid_request", message) from None
        annotations = {each.name: each.annotations.model_dump(exclude_none=True) for each in listed if each.annotations}
        shown = [each for each in listed if _is_allowed(tool, each.name, annotations.get(each.name) or {})]
        tools = [
            {
                "name": each.name,
                "description": each.description,
                "input_schema": each.inputSchema,
                "annotations": None,
            }
            for each in shown
        ]
        return Listed(
            self._secrets.hide(tools),
            {each.name: annotations[each.name] for each in shown if each.name in annotations},
        )

    def _server(self, tool: Mapping[str, Any]) -> mcp.Server:
        return mcp.Server(tool["server_url"], self._secrets.mcp_headers.get(tool["server_label"]) or {})

    # --- items of calls ---

    def begun(self, call: CallItem) -> Item | None:
        """The output item of a call whose arguments are still to come; None: it is shown when it is whole."""
        if call.kind == "function":
            return _function_call(call.item_id, call.call_id, call.name, "", "in_progress")
        if call.kind == "mcp":
            return {**self._mcp_call(call.item_id, call.name, ""), "status": "in_progress"}
        if call.kind == "approval":
            return None
        if call.kind == "file_search":
            return {
                "type": "file_search_call",
                "id": call.item_id,
                "status": "in_progress",
                "queries": [],
                "results": None,
            }
        return {"type": "web_search_call", "id": call.item_id, "status": "in_progress"}

    def asked(self, call: Call) -> Item:
        """The whole item of a call that is not ours to make."""
        if call.kind == "function":
            return _function_call(call.item_id, call.call_id, call.name, call.arguments, "completed")
        return {
            "type": "mcp_approval_request",
            "id": call.item_id,
            "name": call.name,
            "arguments": call.arguments,
            "server_label": self._mcp_tools()[call.name][0]["server_label"],
        }

    def check_approved(self, request: Item) -> None:
        """Raises TurnFailure: the call that is approved is one of a server that this request does not have."""
        name, label = request["name"], request["server_label"]
        found = self._mcp_tools().get(name)
        if found is None or found[0]["server_label"] != label:
            message = f"tools: there is no MCP server {label!r} with a tool {name!r}, whose call the input approves"
            raise TurnFailure("invalid_request", message)

    def cut(self, call: Call) -> IndexedItem:
        """The item of a call that will not be made, because the model was stopped."""
        if call.kind == "function":
            item = _function_call(call.item_id, call.call_id, call.name, call.arguments, "incomplete")
        else:
            item = {**self.done(call, {"content": None, "error": None}), "status": "incomplete"}
        return IndexedItem(output_index=call.output_index, item=unfinished(item))

    def progress(self, call: Call) -> list[str]:
        """The events that tell that a call is being made."""
        if call.kind == "mcp":
            return ["mcp_call.in_progress"]
        return [f"{call.kind}_call.in_progress", f"{call.kind}_call.searching"]

    def outcome(self, call: Call, result: Mapping[str, Any]) -> str:
        failed = call.kind == "mcp" and result.get("error") is not None
        return f"{call.kind}_call.{'failed' if failed else 'completed'}"

    def done(self, call: Call, result: Mapping[str, Any]) -> Item:
        """The item of a call that was made, with the given result."""
        status = "failed" if result.get("error") is not None else "completed"
        if call.kind == "mcp":
            output = None if status == "failed" else result["content"]
            shown = self._mcp_call(call.item_id, call.name, call.arguments)
            return {**shown, "status": status, "output": output, "error": result.get("error")}
        query = _query(call.arguments)
        if call.kind == "file_search":
            included = "file_search_call.results" in (self._request.get("include") or ())
            results = result.get("results") if included else None
            item = {"type": "file_search_call", "id": call.item_id, "status": status, "queries": [query]}
            return {**item, "results": results}
        action = {"type": "search", "query": query}
        return {"type": "web_search_call", "id": call.item_id, "status": status, "action": action}

    def _mcp_call(self, item_id: str, name: str, arguments: str) -> Item:
        found = self._mcp_tools().get(name)
        label = found[0]["server_label"] if found else ""
        return {
            "type": "mcp_call",
            "id": item_id,
            "name": name,
            "arguments": arguments,
            "server_label": label,
            "output": None,
            "error": None,
        }

    def cited(self, indexed: IndexedItem) -> IndexedItem:
        """A message with its `<|file-id|>` marks as annotations, if files were searched."""
        files = {key: name for step in self._journal if isinstance(step, ToolStep) for key, name in step.files.items()}
        if not files or indexed.item["type"] != "message":
            return indexed
        content = []
        for part in indexed.item["content"]:
            if part["type"] == "output_text":
                annotations, text = _extract_citations_from_text(part["text"], files)
                part = part | {"text": text, "annotations": [each.model_dump() for each in annotations]}
            content.append(part)
        return IndexedItem(output_index=indexed.output_index, item=indexed.item | {"content": content})

    # --- calls ---

    def repeatable(self, call: Call) -> bool:
        """Whether a call that was in flight when its worker died may be made again."""
        if call.kind != "mcp" or call.name in self._settings.tools_safe_to_repeat:
            return True
        annotations = self._annotations(call.name)
        return bool(annotations.get("readOnlyHint") or annotations.get("idempotentHint"))

    def unknown(self) -> dict[str, Any]:
        return _failed(OUTCOME_UNKNOWN)

    async def make(self, call: Call, key: str, *, ignored: bool) -> dict[str, Any]:
        """`{"content", "error", "results", "files"}`. Whatever goes wrong is the result, which the model is told, and
        which never has a secret of the request."""
        if ignored:
            return _failed("This call was not made: max_tool_calls calls were made before.")
        try:
            arguments = parsed(call.arguments)
        except ValueError as error:
            return _failed(str(error))
        limit = self._settings.tool_timeout_seconds
        try:
            async with asyncio.timeout(limit) as taken:
                return self._bounded(self._secrets.hide(await self._result(call, arguments, key)))
        except Exception as error:
            if taken.expired():
                return _failed(f"The tool gave no result within {limit:g} s (TOOL_TIMEOUT_SECONDS).")
            said = self._secrets.hide(_words(error))
            logger.warning("tool %s failed: %s", call.name, said)
            return _failed(f"The tool failed: {said}")

    async def _result(self, call: Call, arguments: dict[str, Any], key: str) -> dict[str, Any]:
        if call.kind == "file_search":
            return await self._search_files(str(arguments.get("query") or ""))
        if call.kind == "web_search":
            return await self._search_web(str(arguments.get("query") or ""))
        found = self._mcp_tools().get(call.name)
        if found is None:
            return _failed(f"There is no tool {call.name}.")
        result = await self._mcp.call_tool(self._server(found[0]), call.name, arguments, key)
        text = interleaved_content_as_str(result.content) if result.content else ""
        return _failed(text) if result.error_code else {"content": text, "error": None}

    async def _search_web(self, query: str) -> dict[str, Any]:
        result = await self._given.stack.call_tool(WEB_SEARCH_GROUP, WEB_SEARCH, {"query": query})
        text = interleaved_content_as_str(result.content) if result.content else result.error_message or ""
        return _failed(text) if result.error_code else {"content": text, "error": None}

    async def _search_files(self, query: str) -> dict[str, Any]:
        assert self._file_search is not None
        tool = self._file_search
        if self._given.stack.vector_io is None:
            return _failed("This server has no vector stores: its database has no pgvector.")
        limit = tool.get("max_num_results") or 10
        found: list[Any] = []
        for store in tool["vector_store_ids"]:
            page = await self._given.stack.vector_io.openai_search_vector_store(
                vector_store_id=store,
                query=query,
                filters=tool.get("filters"),
                max_num_results=limit,
                ranking_options=tool.get("ranking_options"),
                rewrite_query=False,
            )
            found += page.data
        found = sorted(found, key=lambda each: each.score, reverse=True)[:limit]
        return _search_result(query, [_search_row(each) for each in found])

    def _bounded(self, result: dict[str, Any]) -> dict[str, Any]:
        size = len(json.dumps(result).encode())
        limit = self._settings.tool_result_max_bytes
        if size <= limit:
            return result
        return _failed(f"The tool's result has {size} bytes, more than the {limit} allowed (TOOL_RESULT_MAX_BYTES).")


def _words(error: Exception) -> str:
    if isinstance(error, Unauthorized):
        return f"{error}: give the tool an authorization, or headers, that it accepts"
    return str(error) or type(error).__name__


def _failed(message: str) -> dict[str, Any]:
    return {"content": message, "error": message}


def _search_row(found: Any) -> dict[str, Any]:
    attributes = found.attributes or {}
    file_id = found.file_id or attributes.get("document_id") or "unknown"
    return {
        "file_id": file_id,
        "filename": found.filename or attributes.get("filename") or file_id,
        "score": found.score,
        "text": "\n".join(part.text for part in found.content or ()),
        "attributes": attributes,
    }


def _search_result(query: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    lines = [f"{SEARCH} tool found {len(rows)} chunks:", f"BEGIN of {SEARCH} tool results."]
    for number, row in enumerate(rows, 1):
        mark = f"<|{row['file_id']}|>"
        lines.append(
            f"[{number}] document_id: {row['file_id']}, score: {row['score']:.4f} (cite as {mark})\n{row['text']}"
        )
    lines.append(f"END of {SEARCH} tool results.")
    lines.append(
        f'The above results were retrieved to help answer the user\'s query: "{query}". {_CITE if rows else ""}'
    )
    files = {row["file_id"]: row["filename"] for row in rows}
    return {"content": "\n".join(lines).rstrip(), "error": None, "results": rows, "files": files}


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema = tool.get("parameters") or tool.get("input_schema")
    function: dict[str, Any] = {"name": tool["name"]}
    if tool.get("description"):
        function["description"] = tool["description"]
    if schema:
        function["parameters"] = schema
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return function


def _function_call(item_id: str, call_id: str, name: str, arguments: str, status: str) -> Item:
    return {
        "type": "function_call",
        "id": item_id,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def _query(arguments: str) -> str:
    try:
        return str(json.loads(arguments).get("query") or "")
    except (ValueError, AttributeError, RecursionError):
        return arguments


def _is_allowed(tool: Mapping[str, Any], name: str, annotations: Mapping[str, Any]) -> bool:
    allowed = tool.get("allowed_tools")
    return allowed is None or _matches(allowed, name, annotations)


def _needs_approval(tool: Mapping[str, Any], name: str, annotations: Mapping[str, Any]) -> bool:
    """`require_approval`: llama_stack's servers take "never" where nothing is said, and so do we."""
    required = tool.get("require_approval") or "never"
    if isinstance(required, str):
        return required == "always"
    if required.get("never") is not None and _matches(required["never"], name, annotations):
        return False
    if required.get("always") is not None:
        return _matches(required["always"], name, annotations)
    return True


def _matches(which: Any, name: str, annotations: Mapping[str, Any]) -> bool:
    """Whether a filter names a tool: a list of names, or `{"tool_names", "read_only"}`."""
    if isinstance(which, list):
        return name in which
    names, read_only = which.get("tool_names"), which.get("read_only")
    if names is not None and name not in names:
        return False
    return read_only is None or bool(annotations.get("readOnlyHint")) == read_only
