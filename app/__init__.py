"""What the web process runs, and what both sides share.

`uvicorn app:main` finds the ASGI application here. It is built only when that name is asked for (PEP 562), so that
`import app.settings` in a worker or a command never starts a web application. There must never be a module
`app/main.py`: importing it would make `app.main` a module and break `uvicorn app:main`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "main":
        raise AttributeError(f"module 'app' has no attribute {name!r}")
    from app.settings import settings_or_exit
    from app.telemetry import configure_logging

    # Before the heavy imports: they log, and a missing setting need not wait for them.
    settings = settings_or_exit()
    configure_logging(settings.log_level, settings.log_format)
    from app.asgi import create_main

    globals()["main"] = create_main(settings)
    return globals()["main"]
