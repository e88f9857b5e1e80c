"""The one exception root, and every error that crosses a room's border.

`CaravanError`s carry a message meant for the person who reads it. The API maps each class to one HTTP status
(`app.api.errors`). `TurnFailure` is different: it is how a turn ends, stored with it and sent as its last event.
"""

from typing import Any, Literal

FailureCode = Literal[
    "cancelled",
    "superseded",
    "deleted",
    "model_error",
    "internal_error",
    "worker_lost",
    "queue_wait_exceeded",
    "input_wait_exceeded",
    "turn_timeout",
    "model_timeout",
    "shield_error",
    "event_log_exceeded",
    "invalid_request",
]


TOLD_CHARACTERS = 2000
CUT_OFF = "… (cut off)"


def told(message: str) -> str:
    """As much of what others said as anybody reads: a server's error may be a whole page of HTML."""
    return message if len(message) <= TOLD_CHARACTERS else message[:TOLD_CHARACTERS] + CUT_OFF


class CaravanError(Exception):
    """Root of all errors of this project."""


class NotFound(CaravanError):
    """There is no such thing, or it belongs to another principal (404)."""

    def __init__(self, noun: str, identifier: str) -> None:
        super().__init__(f"{noun} '{identifier}' not found")


class InvalidRequest(CaravanError):
    """The request itself is wrong, whatever its timing (400). `param` names the field: `input[0].content`."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Conflict(CaravanError):
    """The request is right, but not now: another one got there first (409)."""


class TooManyTurns(CaravanError):
    """There is no room for another turn now; worth trying again later (429)."""


class KeyReused(CaravanError):
    """The Idempotency-Key was given before, with another request (422)."""


class Unavailable(CaravanError):
    """A server that this needs cannot be reached; worth trying again later (503)."""


class CompletionError(CaravanError):
    """A model refused a completion or failed at it. `status` is what HTTP clients get: the model server's, or ours.

    `param` and `code` are OpenAI's, `retry_after` the seconds to wait, where the model server gave them.
    """

    def __init__(
        self,
        message: str,
        status: int,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(told(message))
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after


class OutcomeUnknown(Unavailable):
    """The server went away while it was told to commit: it may have done so, may do so yet, or never will."""


class Unsealable(CaravanError):
    """Sealed secrets cannot be opened with this process's keys, or were changed or moved."""


class AttemptLost(CaravanError):
    """This worker owns the turn no longer: somebody claimed, requeued or ended it. Only the attempt is over."""


class TurnFailure(CaravanError):
    """Why a turn failed or was cancelled: `{"code", "message"}` in its row and in its terminal event.

    `status` is the HTTP status of the model's answer where the model caused it, else None.
    """

    def __init__(self, code: FailureCode, message: str, status: int | None = None) -> None:
        super().__init__(told(message))
        self.code = code
        self.message = told(message)
        self.status = status

    def as_dict(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, **({"status": self.status} if self.status else {})}
