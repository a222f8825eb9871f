"""What can go wrong in a request, and how a client is told.

Model packages raise built-in errors. This file is the one place that turns them into the
object every client of an OpenAI-shaped service knows: message, type, param and code.
"""

from __future__ import annotations

import errno
from typing import Any

from decoders.failures import DecoderOutOfMemory, QueueFull
from decoders.settings import WrongSetting
from encoders.media import MediaError
from services.setting_names import IN_REQUESTS, in_requests


class ServiceError(Exception):
    """Something a caller must be told. ``code`` is stable, ``message`` is for people."""

    status = 500
    type = "server_error"

    def __init__(
        self, message: str, *, code: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return ServiceError.from_wire, (self.to_wire(),)

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the JSON object of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def at(self, param: str) -> ServiceError:
        """Return the same error with the place in the request that it is about."""
        return type(self)(self.message, code=self.code, param=param, retry_after_s=self.retry_after_s)

    def to_wire(self) -> dict[str, Any]:
        """Return plain values from which another process can make this error again."""
        return {
            "kind": type(self).__name__,
            "message": self.message,
            "code": self.code,
            "param": self.param,
            "retry_after_s": self.retry_after_s,
        }

    @staticmethod
    def from_wire(values: dict[str, Any]) -> ServiceError:
        """Make the error again that :meth:`to_wire` described."""
        rest = dict(values)
        kind = KINDS[rest.pop("kind")]
        return kind(rest.pop("message"), **rest)


class BadRequest(ServiceError):
    """The request can never work as it is."""

    status = 400
    type = "invalid_request_error"


class NotFound(ServiceError):
    """The thing that was named does not exist."""

    status = 404
    type = "not_found_error"


class MethodNotAllowed(ServiceError):
    """The path exists, the method does not."""

    status = 405
    type = "invalid_request_error"


class Conflict(ServiceError):
    """It cannot be done to the thing as it is now."""

    status = 409
    type = "conflict_error"


class TooLarge(ServiceError):
    """The request, or a medium in it, is above a limit."""

    status = 413
    type = "invalid_request_error"


class Unprocessable(ServiceError):
    """The form of the request is wrong."""

    status = 422
    type = "invalid_request_error"


class RangeNotSatisfiable(ServiceError):
    """The bytes that were asked for are not in the file."""

    status = 416
    type = "invalid_request_error"


class Internal(ServiceError):
    """A mistake of ours."""


class Unavailable(ServiceError):
    """It would work, but not now."""

    status = 503


class TooManyRequests(ServiceError):
    """More is asked for than can be made in a reasonable time."""

    status = 429
    type = "rate_limit_error"


class PresetProblem(ServiceError):
    """A preset is unknown, wrong, or its weights are not what it says."""


KINDS: dict[str, type[ServiceError]] = {
    kind.__name__: kind
    for kind in (
        ServiceError,
        BadRequest,
        NotFound,
        MethodNotAllowed,
        Conflict,
        TooLarge,
        Unprocessable,
        RangeNotSatisfiable,
        Internal,
        Unavailable,
        TooManyRequests,
        PresetProblem,
    )
}


def translate(error: BaseException) -> ServiceError:
    """Return what a client is told about ``error``; an error it cannot place is an internal one."""
    message = str(error) or type(error).__name__
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, MediaError):
        kind = TooLarge if error.code == "media_limit_exceeded" else BadRequest
        return kind(message, code=error.code)
    if isinstance(error, QueueFull):
        return TooManyRequests(message, code="queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, DecoderOutOfMemory):
        return Unavailable(message, code="decoder_oom")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Unavailable(
            "Not enough memory for this request. Ask for less at once, or try again later.",
            code="out_of_memory",
            retry_after_s=5,
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return Unavailable(
            "The disk of the service is full. Free some space, then try again.",
            code="storage_full",
            retry_after_s=60,
        )
    if isinstance(error, WrongSetting):
        told = IN_REQUESTS.get(error.name, error.name)
        return BadRequest(in_requests(message, error.name), code="invalid_value", param=told)
    if isinstance(error, ValueError):
        return BadRequest(
            message, code=str(getattr(error, "code", "invalid_value")), param=getattr(error, "param", None)
        )
    return Internal(
        f"Something went wrong inside the service ({type(error).__name__}). Its log has the details.",
        code="internal_error",
    )


def of_the_system(error: OSError) -> str:
    """Return a failure of the system as one sentence and a way out."""
    if error.errno is None:  # one of our own, in our words
        return str(error)
    what = f"{error.filename} cannot be used" if error.filename else "A file or the network cannot be used"
    return f"{what}: {error.strerror}. Look at the path, its rights and the free space, then try again."
