"""What is checked before a request is read: the host, the origin, the key, and the size of the body. Plain ASGI.

Without these, any web page that a user visits could use a server on this machine: a page may send simple requests to
any address, and after its domain's address has changed to 127.0.0.1 it may even read the answers.
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from matquant.serve.errors import ApiError
from matquant.serve.running import error_response

OPEN_PATHS = ("/", "/health", "/ping", "/favicon.ico")  # need no key: they show nothing of the model
BODY_BYTES = 2**23
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """api_keys: one of them is needed, none for none. hosts: names by which the server may be addressed, () for any.

    origins: of web pages that may use the server ("*" for all); it is always open to its playground.
    """

    api_keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    body_bytes: int = BODY_BYTES


class Guard:
    """The middleware: answer with an error, or pass the request on."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            check_request(scope, self._limits)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        """Return ``receive`` that raises ApiError once the body is too large."""
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            check_size(size, self._limits)
            return message

        return counted


def check_request(scope: Scope, limits: Limits) -> None:
    """Raise ApiError for a request that may not be read."""
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    host = _host(headers.get("host", ""))
    if limits.hosts and host not in limits.hosts:
        raise ApiError(
            f"this server does not answer to the host {host!r}; start it with --allow-host {host}", status=403
        )
    origin = headers.get("origin")
    if origin is not None and not _is_allowed(origin, headers.get("host", ""), limits):
        raise ApiError(
            f"web pages of {origin!r} may not use this server; start it with --cors-origin {origin}", status=403
        )
    if limits.api_keys and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
        _check_key(headers.get("authorization", ""), limits.api_keys)
    length = headers.get("content-length", "")
    if length.isdigit():
        check_size(int(length[:20]), limits)


def check_size(size: int, limits: Limits) -> None:
    """Raise ApiError for a body that is too large."""
    if size > limits.body_bytes:
        raise ApiError(
            f"the body has more than {limits.body_bytes:,} bytes; send less, or use --max-body-mb", status=413
        )


def _host(header: str) -> str:
    """Return the name in a Host header, without the port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


def _is_allowed(origin: str, host: str, limits: Limits) -> bool:
    return "*" in limits.origins or origin in limits.origins or urlsplit(origin).netloc.lower() == host.lower()


def _check_key(header: str, keys: Sequence[str]) -> None:
    kind, _, given = header.partition(" ")
    found = False
    for key in keys:  # all of them, so that the time does not tell which one is close
        found |= hmac.compare_digest(given.strip().encode("latin-1", "replace"), key.encode())
    if kind.lower() != "bearer" or not found:
        raise ApiError(
            "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
            status=401,
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
