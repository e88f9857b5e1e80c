"""What only a worker runs. `celery -A tasks worker` finds the application here, under the name that Celery looks for.

`from app import settings` binds a name, not the package `app`, here: `celery -A tasks` would take `tasks.app` for the
Celery application.
"""

import os

from celery import Celery, signals

from app import settings
from app.telemetry import configure_logging

# Read by llama_stack when it is imported: its own loggers print nothing below a warning.
os.environ.setdefault("LLAMA_STACK_LOGGING", "all=warning")

celery = Celery("tasks")
celery.config_from_object("celeryconfig")
celery.conf.update(include=["tasks.turns"])


@signals.setup_logging.connect
def _configure_logging(**_: object) -> None:
    configured = settings.get_settings()
    configure_logging(configured.log_level, configured.log_format)
