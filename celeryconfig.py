"""Celery's configuration for workers, for whoever rings, and for Flower. Values come from `app.settings`.

The broker's own safety nets are off on purpose: a turn's lease in Postgres recovers it, not a redelivered message.
"""

from app.dispatch import QUEUE
from app.settings import settings_or_exit

_settings = settings_or_exit()

broker_url = _settings.broker_url
broker_connection_retry_on_startup = True
broker_connection_max_retries = None
broker_transport_options = {
    "socket_connect_timeout": 2,
    "socket_timeout": 5,
    "socket_keepalive": True,
    "retry_on_timeout": False,
    # No copy of a message is kept until it is acknowledged: whoever loses one is rung again.
    "ack_emulation": False,
}
task_default_queue = QUEUE
task_create_missing_queues = True
task_serializer = "json"
accept_content = ["json"]
task_ignore_result = True
task_store_errors_even_if_ignored = False
task_acks_late = False
worker_consumer = "tasks.consumer:Consumer"
worker_prefetch_multiplier = 1
worker_disable_prefetch = True
worker_enable_prefetch_count_reduction = False
worker_hijack_root_logger = False
worker_redirect_stdouts = False
# A child initializes the whole Llama Stack before it is up.
worker_proc_alive_timeout = 60
worker_cancel_long_running_tasks_on_connection_loss = False
