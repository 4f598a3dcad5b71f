"""The routes of the server: OpenAI's, vLLM's for tokens and health, and the playground."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from matquant.serve import chat, completions, texts
from matquant.serve.errors import ApiError
from matquant.serve.fields import is_unicode
from matquant.serve.jobs import Job
from matquant.serve.limits import Guard, Limits
from matquant.serve.models import describe
from matquant.serve.running import GONE, error_response, ignored_header, json_response, respond
from matquant.serve.service import Service
from matquant.system.errors import InputError

PREPARE: dict[str, Callable[[Service, Any], Job]] = {
    "/v1/chat/completions": chat.prepare,
    "/v1/completions": completions.prepare,
}
OTHERS = {"/tokenize": texts.tokenize, "/detokenize": texts.detokenize}
NOT_HERE = {  # known routes of other servers -> what to use
    "/v1/responses": "use /v1/chat/completions",
    "/v1/messages": "use /v1/chat/completions",
    "/v1/embeddings": "this server generates text only",
    "/v1/moderations": "this server generates text only",
    "/v1/audio/transcriptions": "this server reads text only",
}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, limits: Limits) -> Starlette:
    """Return the application."""
    routes = [
        *(Route(path, _answering(service, prepare), methods=["POST"]) for path, prepare in PREPARE.items()),
        *(Route(path, _texts(service, work), methods=["POST"]) for path, work in OTHERS.items()),
        *(Route(path, _shown(show, service), methods=["GET"]) for path, show in SHOWN.items()),
        Route("/v1/models/{name:path}", _shown(_model, service), methods=["GET"]),
        Route("/", _page(), methods=["GET"]),
    ]
    middleware = [Middleware(Guard, limits)]
    if limits.origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(limits.origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
                expose_headers=["x-matquant-width", "x-matquant-width-start", "x-ignored-fields", "x-request-id"],
            )
        )
    handlers: dict[Any, Any] = {
        ApiError: _api_error,
        InputError: _input_error,
        HTTPException: _http_error,
        ClientDisconnect: _gone,
        Exception: _failure,
    }
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


async def _json(request: Request) -> Any:
    """Return the body of a request. ApiError unless it is JSON."""
    body = await request.body()
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text)
        escapes = value.items() if isinstance(value, dict) and "\\ud" in text.lower() else ()
        broken = next((name for name, part in escapes if not is_unicode([name, part])), None)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON ({error}); send a JSON object", code="invalid_json") from None
    if broken is not None:
        raise ApiError(f"{broken!a} has half a surrogate pair; give Unicode text", param=broken)
    return value


def _answering(service: Service, prepare: Callable[[Service, Any], Job]) -> Endpoint:
    async def answer(request: Request) -> Response:
        body = await _json(request)
        if service.is_draining:
            raise ApiError("the server is stopping; try another one", status=503, headers={"retry-after": "5"})
        job = await asyncio.to_thread(prepare, service, body)
        service.active += 1
        try:
            return _counted(service, await respond(service, job, request.receive), is_stream=job.stream)
        except BaseException:
            service.active -= 1
            raise

    return answer


def _counted(service: Service, response: Response, *, is_stream: bool) -> Response:
    """Take one answer from ``active`` when the response is written."""
    if not is_stream:
        service.active -= 1
        return response
    return _Counted(service, response)


class _Counted(Response):
    """A stream that counts as active until it has ended."""

    def __init__(self, service: Service, inner: Response) -> None:
        super().__init__()
        self._service, self._inner = service, inner

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._inner(scope, receive, send)
        finally:
            self._service.active -= 1


def _texts(service: Service, work: Callable[[Service, Any], texts.Found]) -> Endpoint:
    async def answer(request: Request) -> Response:
        found, ignored = await asyncio.to_thread(work, service, await _json(request))
        return json_response(found, headers=ignored_header(ignored))

    return answer


# ------------------------------------------------------------------------------------------------------- what is shown


def _shown(show: Callable[[Service, Request], Response], service: Service) -> Endpoint:
    async def answer(request: Request) -> Response:
        return show(service, request)

    return answer


def _models(service: Service, request: Request) -> Response:
    models = service.models
    return json_response({"object": "list", "data": [describe(models, name) for name in models.ids()]})


def _model(service: Service, request: Request) -> Response:
    return json_response(describe(service.models, request.path_params["name"]))


def _health(service: Service, request: Request) -> Response:
    if service.is_draining:
        raise ApiError("the server is stopping", status=503)
    if service.batcher.stats().get("failed"):
        raise ApiError("the engine has failed; see the server's log, and start it again", status=503)
    return json_response({"status": "ok"})


def _version(service: Service, request: Request) -> Response:
    return json_response(
        {"version": version("matquant"), "fingerprint": service.fingerprint, **texts.defaults(service)}
    )


def _load(service: Service, request: Request) -> Response:
    return json_response({"server_load": service.active})


def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _tokenizer_info(service: Service, request: Request) -> Response:
    return json_response(texts.tokenizer_info(service))


SHOWN: dict[str, Callable[[Service, Request], Response]] = {
    "/v1/models": _models,
    "/health": _health,
    "/ping": _health,
    "/version": _version,
    "/load": _load,
    "/metrics": _metrics,
    "/tokenizer_info": _tokenizer_info,
}


def _page() -> Endpoint:
    text = files("matquant.serve").joinpath("playground.html").read_text(encoding="utf-8")

    async def page(request: Request) -> Response:
        return Response(text, media_type="text/html", headers=PAGE_HEADERS)

    return page


# -------------------------------------------------------------------------------------------------------------- errors


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    words = {404: f"{path} does not exist here; {NOT_HERE.get(path, 'see docs/serving.md for the routes')}"}
    words[405] = f"{path} does not take {request.method}"
    found = ApiError(words.get(error.status_code, str(error.detail)), status=error.status_code)
    found.headers |= dict(error.headers or {})
    return error_response(found)


async def _input_error(request: Request, error: Exception) -> Response:
    return error_response(ApiError(str(error)))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


async def _failure(request: Request, error: Exception) -> Response:
    return error_response(ApiError("the server failed; its log has the reason", status=500))
