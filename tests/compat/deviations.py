"""Where our answers mean to differ from the captured ones, each with its reason."""

from __future__ import annotations

from typing import Any
from unittest.mock import ANY

from tests.compat.contract import MISSING, SDK_ROUTES, SERVED, Deviation, Json, Matching


def _progress(**delta: Any) -> Json:
    payload = {"event_type": "step_progress", "step_type": "inference", "step_id": ANY, "delta": delta}
    return {"event": {"payload": payload}}


_EVENT_ID = Matching(r"\d+-\d+")
_OWN_ID = Matching(r"<our id \d+>")
_NOT_FOUND = {"detail": Matching(r"(Agent|Session|Turn) 'nope' not found")}
_STEPS_OF_0_2 = tuple(
    f"s24-v1/{name}"
    for name in ("get_session", "get_turn", "get_step", "turn_client_tool_1_awaiting", "turn_client_tool_2_resume")
)
_BATCHED_INFERENCE = ("rerank", "batch-completion", "batch-chat-completion")
_SINGLE_INFERENCE = ("chat-completion", "completion", "embeddings")
_NEWER_FIELDS_OF_MODELS = ("model_id", "id", "object", "created", "owned_by", "custom_metadata")
_RESPONSE_STREAMS = tuple(f"s35-responses/response_{name}" for name in ("stream", "function_call", "mcp", "err"))
_RESPONSE_FIELDS = (
    "background",
    "completed_at",
    "conversation",
    "incomplete_details",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "prompt_cache_key",
    "reasoning",
    "safety_identifier",
    "service_tier",
    "store",
    "tool_choice",
    "user",
)
_TURN = {
    "turn_id": ANY,
    "session_id": ANY,
    "input_messages": [{"role": "user", "content": "SAY nonstream", "context": None}],
    "steps": [ANY],
    "output_message": {"role": "assistant", "content": "nonstream ", "stop_reason": "end_of_turn", "tool_calls": []},
    "output_attachments": [],
    "started_at": "<time>",
    "completed_at": "<time>",
}

DEVIATIONS = [
    # --- every version ---
    Deviation(
        "An event has an id, behind which its stream can be joined again",
        ("s35-v1/turn_*", "s35-v1alpha/turn_*", "s24-v1/turn_*"),
        {"body.*.id": (MISSING, _EVENT_ID)},
    ),
    Deviation(
        "An unknown id is 404 (there 400)",
        ("*/get_agent_missing", "*/get_session_missing"),
        {"status": (400, 404), "body": ({"detail": ANY}, _NOT_FOUND)},
    ),
    Deviation(
        "An unknown turn is 404 (there null)",
        ("*/get_turn_missing",),
        {"status": (200, 404), "body": (None, _NOT_FOUND)},
    ),
    Deviation(
        "A turn of an unknown agent or session is refused before its stream (there an event: the 0.2.2 SDK hangs)",
        ("*/turn_bad_agent", "*/turn_bad_session"),
        {
            "status": (200, 404),
            "headers.content-type": ("text/event-stream; charset=utf-8", "application/json"),
            "headers.transfer-encoding": ("chunked", MISSING),
            "body": ([{"data": {"error": {"message": ANY}}}], _NOT_FOUND),
        },
    ),
    Deviation(
        "A turn can be had without a stream (there 501)",
        ("*/turn_nonstream",),
        {"status": (501, 200), "body": ({"detail": ANY}, _TURN)},
    ),
    Deviation(
        "No client is refused for its version (there 426)",
        ("s35-v1/version_426",),
        {
            "status": (426, 200),
            "headers.transfer-encoding": ("chunked", MISSING),
            "body": ({"error": ANY}, ANY),
        },
    ),
    Deviation(
        "The step of a client's tools has an id of its own (there the inference step's), so that GET step finds it",
        ("*/get_session", "*/get_turn", "*/turn_client_tool_2_resume"),
        {"**.steps.1.step_id": (ANY, _OWN_ID)},
    ),
    Deviation(
        "The same in the event of that step",
        ("*/turn_client_tool_2_resume",),
        {
            "body.0.data.event.payload.step_id": (ANY, _OWN_ID),
            "body.0.data.event.payload.step_details.step_id": (ANY, _OWN_ID),
        },
    ),
    Deviation(
        "An error has a code, and the status of the model server; its message is the model server's",
        ("*/turn_model_err400", "*/turn_model_err500"),
        {
            "body.1.data.error.message": (ANY, Matching("400: scripted 400|500: scripted 500")),
            "body.1.data.error.code": (MISSING, "model_error"),
            "body.1.data.error.status": (MISSING, ANY),
        },
    ),
    Deviation(
        "The url of a list is its path (there its template)",
        ("*/list_sessions",),
        {"body.url": (ANY, Matching(r"/v1(alpha)?/agents/[-0-9a-f]{36}/sessions"))},
    ),
    # --- 0.2 ---
    Deviation(
        "No empty text before the first words: clients join the texts",
        ("s24-v1/turn_plain", "s24-v1/turn_client_tool_1_awaiting", "s24-v1/turn_client_tool_2_resume"),
        {"body.*": ({"data": _progress(type="text", text="")}, MISSING)},
    ),
    Deviation(
        "The pieces of a tool call come before the whole of it, as in 0.3.5: 0.2 clients know them as text",
        ("s24-v1/turn_client_tool_1_awaiting",),
        {
            "body.*": (
                MISSING,
                {"id": _EVENT_ID, "data": _progress(type="tool_call", tool_call=ANY, parse_status="in_progress")},
            )
        },
    ),
    Deviation(
        "A message that calls a client's tool stops with end_of_message in its step too, as in its turn",
        _STEPS_OF_0_2,
        {"**.model_response.stop_reason": ("end_of_turn", "end_of_message")},
    ),
    Deviation(
        "Fields of 0.3.5 stand beside those of 0.2, whose clients ignore them",
        ("s24-v1/get_agent", "s24-v1/list_agents"),
        {f"**.client_tools.0.{field}": (MISSING, ANY) for field in ("toolgroup_id", "input_schema", "output_schema")},
    ),
    Deviation(
        "Fields of 0.3.5 stand beside those of 0.2, whose clients ignore them: tools",
        ("s24-v1/tools",),
        {f"body.data.0.{field}": (MISSING, ANY) for field in ("name", "input_schema", "output_schema")},
    ),
    # --- responses and conversations: the shapes of OpenAI's today ---
    Deviation(
        "Every event has the name that openai's SDKs know it by",
        _RESPONSE_STREAMS,
        {"body.*.event": (MISSING, Matching(r"response\..*"))},
    ),
    Deviation(
        "Every event has a number, without gap",
        _RESPONSE_STREAMS,
        {"body.*.data.sequence_number": (ANY, ANY)},
    ),
    Deviation(
        "Fields of a response that 0.3.5's had not",
        _RESPONSE_STREAMS,
        {f"body.*.data.response.{field}": (MISSING, ANY) for field in _RESPONSE_FIELDS},
    ),
    Deviation(
        "Fields of a response that 0.3.5's had not: without a stream",
        ("s35-responses/response_nonstream",),
        {f"body.{field}": (MISSING, ANY) for field in _RESPONSE_FIELDS},
    ),
    Deviation(
        "Fields of items and their events that 0.3.5's had not",
        ("s35-responses/response_mcp",),
        {f"body.*.data.{field}": (MISSING, ANY) for field in ("item_id", "output_index", "item.status", "item.error")}
        | {
            "body.*.data.response.output.*.status": (MISSING, ANY),
            "body.*.data.response.output.0.error": (MISSING, ANY),
        }
        | {"**.tools.0.annotations": (MISSING, "null")},
    ),
    Deviation(
        "The end of a function's arguments names it",
        ("s35-responses/response_function_call",),
        {"body.5.data.name": (MISSING, "gbp")},
    ),
    Deviation(
        "A text has a list of logprobs",
        ("s35-responses/response_stream", "s35-responses/response_mcp"),
        {
            "body.*.data.part.logprobs": (None, []),
            "body.*.data.logprobs": (MISSING, []),
            "body.*.data.item.content.0.logprobs": (MISSING, []),
            "body.*.data.response.output.*.content.0.logprobs": (MISSING, []),
        },
    ),
    Deviation(
        "A text has a list of logprobs: without a stream",
        ("s35-responses/response_nonstream", "s35-responses/conv_items"),
        {"body.*.0.content.0.logprobs": (MISSING, [])},
    ),
    Deviation(
        "An event tells the end of a text",
        ("s35-responses/response_stream", "s35-responses/response_mcp"),
        {"body.*": (MISSING, {"event": "response.output_text.done", "data": ANY})},
    ),
    Deviation(
        "What a request leaves out is told with OpenAI's default",
        (*_RESPONSE_STREAMS, "s35-responses/response_nonstream"),
        {"**.parallel_tool_calls": (False, True), "**.truncation": (None, "disabled")},
    ),
    Deviation(
        "An MCP tool is told with its server's address",
        ("s35-responses/response_mcp",),
        {"**.response.tools.0.server_url": (MISSING, ANY)},
    ),
    Deviation(
        "Ids of MCP items begin as OpenAI's do",
        ("s35-responses/response_mcp",),
        {
            "**.id": (Matching("<(mcp_list|fc) .*>"), Matching("<our (mcpl|mcp) .*>")),
            "**.item_id": (Matching("<fc .*>"), Matching("<our mcp .*>")),
        },
    ),
    Deviation(
        "The item of a list of tools is added before the list is in progress",
        ("s35-responses/response_mcp",),
        {
            "body.2": (MISSING, {"event": "response.output_item.added", "data": ANY}),
            "body.3": ({"data": ANY}, MISSING),
        },
    ),
    Deviation(
        "The arguments of an MCP call come behind its item, in events of their own (there a function's)",
        ("s35-responses/response_mcp",),
        {f"body.{index}": ({"data": ANY}, MISSING) for index in (6, 7, 9)},
    ),
    Deviation(
        "The item of an MCP call comes before its arguments, whose last event names the tool",
        ("s35-responses/response_mcp",),
        {
            "body.6": (
                MISSING,
                {
                    "event": Matching(r"response\.(output_item\.added|mcp_call\.arguments\.delta)"),
                    "data": ANY,
                },
            ),
            "body.8.data.name": (MISSING, "add"),
        },
    ),
    Deviation(
        "The tokens of a streamed response are counted too",
        tuple(f"s35-responses/response_{name}" for name in ("stream", "function_call", "mcp")),
        {"body.*.data.response.usage": (None, ANY)},
    ),
    Deviation(
        "The details of the count of tokens are numbers",
        ("s35-responses/response_nonstream",),
        {"body.usage.*_tokens_details": (None, ANY)},
    ),
    Deviation(
        "An error has the code that a turn's has; its message is the model server's",
        ("s35-responses/response_err",),
        {
            "body.2.data.response.error.code": ("internal_error", "model_error"),
            "body.2.data.response.error.message": ("Error code: 400 - scripted 400", "400: scripted 400"),
        },
    ),
    Deviation(
        "A message of the user is an item like any other: its content has parts, and it is completed",
        ("s35-responses/conv_items",),
        {
            "body.data.1.content": ("SAY hello world", [{"type": "input_text", "text": "SAY hello world"}]),
            "body.data.1.status": (None, "completed"),
        },
    ),
    # --- routes ---
    Deviation(
        "Rows of models have the fields of newer clients and of openai's too",
        ("*/models", "*/version_426"),
        {f"body.data.0.{field}": (MISSING, ANY) for field in _NEWER_FIELDS_OF_MODELS} | {"body.object": (MISSING, ANY)},
    ),
    Deviation(
        "Rows of tools have the fields of 0.2 beside those of 0.3",
        ("s35-v1alpha/tools",),
        {
            f"body.data.0.{field}": (MISSING, ANY)
            for field in ("identifier", "type", "provider_id", "provider_resource_id", "parameters")
        },
    ),
    Deviation(
        "Parameters have defaults: the tools of the tests' MCP server are others",
        ("s24-v1/tools",),
        {"body.data.0.parameters": (ANY, ANY)},
    ),
    Deviation(
        "0.2's inference in batches, and its rerank, are not translated",
        (SDK_ROUTES,),
        {f"POST /v1/inference/{name}": (SERVED, MISSING) for name in _BATCHED_INFERENCE},
    ),
    Deviation(
        "The list of routes is that of 0.3.5",
        ("s24-v1/routes",),
        {
            f"body.routes.POST /v1/inference/{name}": (SERVED, MISSING)
            for name in (*_SINGLE_INFERENCE, *_BATCHED_INFERENCE)
        },
    ),
    Deviation(
        "APIs without a provider here; the captured servers do not list them either",
        (SDK_ROUTES,),
        {
            f"** {path}**": (SERVED, MISSING)
            for path in (
                "/v1/datasets",
                "/v1/datasetio",
                "/v1/eval",
                "/v1/post-training",
                "/v1/scoring",
                "/v1/synthetic-data-generation",
                "/v1/telemetry",
                "/v1/batches",
                "/v1/batch-inference",
                "/v1alpha/eval",
                "/v1alpha/post-training",
                "/v1alpha/telemetry",
                "/v1beta/datasets",
                "/v1beta/datasetio",
            )
        },
    ),
    Deviation(
        "Chat completions are not stored, so none can be listed",
        (SDK_ROUTES,),
        {"GET **/chat/completions**": (SERVED, 501)},
    ),
    Deviation(
        "Routes that came after 0.3.5, and that no agent needs",
        (SDK_ROUTES,),
        {"* /v1alpha/admin/**": (SERVED, MISSING), "PUT /v1/prompts/**": (SERVED, MISSING)},
    ),
]
