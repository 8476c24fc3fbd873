"""Every error a user can cause, in one tree; HTTP status and OpenAI error type are decided here and nowhere else.

    DeskrouteError                  500 server_error
     ├── InputError                 400 invalid_request_error    what was sent or given is wrong
     │    ├── ConfigError                                        a configuration file or value
     │    ├── ArticleError                                       a knowledge article
     │    ├── TicketError                                        a ticket file
     │    ├── AdapterError                                       an adapter that does not fit or is damaged
     │    ├── ContextLengthError    400 context_length_exceeded
     │    ├── UnknownModelError     404 model_not_found
     │    ├── TooLargeError         413 request_too_large
     │    ├── AuthError             401 invalid_api_key
     │    └── UnknownRequestError   404 request_not_found        a rating of a request nobody made
     ├── NotReadyError              503 not_ready                try again shortly
     │    └── QueueFullError        503 queue_full               every row and every queue place is taken
     ├── RegistryError              503 registry_unavailable     MLflow cannot be reached or holds something broken
     └── WorkError                  500 work_failed              a pipeline stage failed after a valid start

On the command line an InputError ends with exit code 2, any other with 1.
"""

from __future__ import annotations


class DeskrouteError(Exception):
    """Base of every error raised on purpose; the message names what is wrong and the way out."""

    status = 500
    type = "server_error"
    code: str | None = None
    exit_code = 1

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    @property
    def message(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross from a Ray replica to the ingress; the default would lose `param`.
        return (_rebuild, (type(self), self.message, self.param))


def _rebuild(kind: type[DeskrouteError], message: str, param: str | None) -> DeskrouteError:
    return kind(message, param=param)


class InputError(DeskrouteError):
    """What was sent or given is wrong."""

    status = 400
    type = "invalid_request_error"
    exit_code = 2


class ConfigError(InputError):
    """A configuration file or value."""


class ArticleError(InputError):
    """A knowledge article."""


class TicketError(InputError):
    """A ticket file."""


class AdapterError(InputError):
    """An adapter that does not fit the base, or is damaged."""


class ContextLengthError(InputError):
    """Prompt plus answer do not fit the base model's context."""

    code = "context_length_exceeded"


class UnknownModelError(InputError):
    """A `model` that is neither "auto", "base" nor a persona."""

    status = 404
    code = "model_not_found"


class TooLargeError(InputError):
    """A body over the size limit."""

    status = 413
    code = "request_too_large"


class AuthError(InputError):
    """A missing or wrong API key."""

    status = 401
    code = "invalid_api_key"


class UnknownRequestError(InputError):
    """A request_id that was not answered here."""

    status = 404
    code = "request_not_found"


class NotReadyError(DeskrouteError):
    """A pool is not up yet, or went away."""

    status = 503
    type = "service_unavailable"
    code = "not_ready"


class QueueFullError(NotReadyError):
    """Every row and every place in the queue is taken."""

    code = "queue_full"


class RegistryError(DeskrouteError):
    """MLflow cannot be reached or holds something broken."""

    status = 503
    type = "service_unavailable"
    code = "registry_unavailable"


class WorkError(DeskrouteError):
    """A pipeline stage failed after a valid start."""


def registry_fault(error: Exception) -> str | None:
    """MLflow's own faults and those of its store, in the middle of a stage, in a sentence; None for any other error."""
    if type(error).__module__.partition(".")[0] not in ("mlflow", "sqlalchemy"):
        return None
    return f"the registry failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
