"""Errors as OpenAI's API gives them: {"error": {"message", "type", "param", "code"}} with an HTTP status."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

TYPES = {  # status -> the type of the error
    400: "BadRequestError",
    401: "authentication_error",
    403: "permission_error",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    429: "rate_limit_error",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
NO_RETRY = {"x-should-retry": "false"}  # the openai client retries 409 and 5xx unless this says otherwise


class ApiError(Exception):
    """A request that is answered with an error. param: the field at fault. code: OpenAI's name for some of them."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = {**(NO_RETRY if status < 429 else {}), **headers}

    def to_json(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = TYPES.get(self.status, TYPES[400])
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code or self.status}}


def busy(reason: str, retry_after_s: float, *, ends: bool = False) -> ApiError:
    """Return the error for a request that was not admitted: 429, or 503 if the server stops or its engine failed."""
    seconds = max(1, round(retry_after_s))
    return ApiError(
        f"{reason}; try again in {seconds} s", status=503 if ends else 429, headers={"retry-after": str(seconds)}
    )
