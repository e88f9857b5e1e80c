"""Embeddings on the CPU: `python -m app.local.embeddings --port 8322` serves all-MiniLM-L6-v2 as OpenAI does.

llama.cpp (xllamacpp) computes in this process; the routes are ours, since its own take no text that is too long. Texts
are cut off at 256 tokens, as by sentence-transformers, so that the vectors are those that everybody has of this model.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, StringConstraints, field_validator
from starlette.concurrency import run_in_threadpool

from app.local import minilm
from app.local.model import compute_threads
from app.local.server import HOST, LocalError, ModelServer, port_in_use

PORT = 8322
"""Where EMBEDDING_URL looks by default."""

MAX_INPUTS = 2048
"""Texts of one request: OpenAI's limit."""

BATCH = 16
"""Texts computed together: requests at once take turns, and one whose client has left ends here."""

JSON = dict[str, Any]
Text = Annotated[str, StringConstraints(max_length=1_000_000)]


class Embeddings(ModelServer):
    """The embeddings server as a child."""

    name = "embeddings"
    module = "app.local.embeddings"


class EmbeddingsRequest(BaseModel):
    """OpenAI's, of texts. Tokens would be those of another model."""

    input: Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Literal[384] | None = None  # minilm.DIMENSION

    @field_validator("input", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Model:
    """The loaded model. Raises LocalError: it is not installed, or cannot be made."""

    def __init__(self) -> None:
        import xllamacpp

        self._tokenizer = minilm.Tokenizer()
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(minilm.gguf_file())
        parameters.hostnames = [HOST]
        parameters.port = 0  # llama.cpp's own routes, which nobody is told of
        parameters.embedding = True
        parameters.n_ctx = 0  # the model's own
        parameters.n_parallel = 4
        parameters.n_batch = parameters.n_ubatch = 4 * minilm.MAX_TOKENS
        parameters.cpuparams.n_threads = compute_threads()
        parameters.cpuparams.poll = 0  # threads that wait for work leave the processor to others
        parameters.ui = False
        parameters.verbosity = 0
        self._server = xllamacpp.Server(parameters)

    def embed(self, texts: list[str], encoding_format: str) -> tuple[list[JSON], int]:
        """OpenAI's entries, of length 1 each, and how many tokens the texts have. Blocks; safe in any thread."""
        answer = self._server.handle_embeddings(
            {"input": self._tokenizer.tokens(texts), "encoding_format": encoding_format}
        )
        if "error" in answer:
            raise RuntimeError(answer["error"]["message"])
        return answer["data"], answer["usage"]["total_tokens"]


def application(model: Model) -> FastAPI:
    """`/health`, `/v1/models` and `/v1/embeddings`."""
    app = FastAPI(title="Caravan's embeddings server", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> JSON:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> JSON:
        model = {"id": minilm.MODEL_ID, "object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest, request: Request) -> JSONResponse:
        data: list[JSON] = []
        tokens = 0
        for start in range(0, len(body.input), BATCH):
            if await request.is_disconnected():
                break
            texts = body.input[start : start + BATCH]
            entries, used = await run_in_threadpool(model.embed, texts, body.encoding_format)
            data += [{**entry, "index": start + entry["index"]} for entry in entries]
            tokens += used
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "model": minilm.MODEL_ID, "data": data, "usage": usage})

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        message = f"{'.'.join(str(part) for part in first['loc'][1:]) or 'body'}: {first['msg']}"
        problem = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": problem}, 400)

    return app


def serve(port: int, host: str = HOST) -> None:
    """Serves until SIGTERM or SIGINT. Raises LocalError: the model cannot be had, or the port is taken."""
    import uvicorn

    if port_in_use(port):
        raise LocalError(f"port {port} is in use: name another one with --port, and in EMBEDDING_URL")
    app = application(Model())
    print(f"{minilm.MODEL_ID} on http://{host}:{port}/v1", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=1)
    sys.stdout.flush()
    # llama.cpp's threads need no farewell, and waiting for theirs can take seconds.
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves all-MiniLM-L6-v2 as OpenAI does.")
    parser.add_argument("--port", type=int, default=PORT)
    arguments = parser.parse_args()
    try:
        serve(arguments.port)
    except LocalError as error:
        sys.exit(f"caravan: {error}")


if __name__ == "__main__":
    main()
