"""Start the server, and stop it: bind, load, measure, answer, and on SIGTERM finish what runs.

The address is bound before the model is loaded, so that a busy port is known at once, but connections are accepted only
when the server is ready. On SIGTERM or Ctrl-C /health answers 503, nothing new is admitted, running answers may finish
within ``drain_s`` seconds, and the process ends with exit code 0; a second signal ends it at once.
"""

import asyncio
import contextlib
import errno
import hashlib
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from matquant import _native
from matquant.core.nest import MASTER_BITS
from matquant.engine.engine import Engine
from matquant.engine.speculation import OFF, check_speculate
from matquant.format.manifest import MANIFEST
from matquant.hf.renderer import warm
from matquant.hf.templates import WITH_TOOLS
from matquant.serve.admission import ROWS, available_bytes
from matquant.serve.app import make_app
from matquant.serve.cost import Costs, drafting, measure
from matquant.serve.limits import LOOPBACK, Limits
from matquant.serve.metrics import Metrics
from matquant.serve.models import Models
from matquant.serve.offers import check_context, listed_widths, model_name, offer, read_plans
from matquant.serve.refine import Arrivals
from matquant.serve.service import Service
from matquant.serve.tools import FORMS, probe
from matquant.serve.work import Batcher
from matquant.system.errors import InputError
from matquant.system.progress import Log
from matquant.system.startup import INTERRUPTED

MOST_PORT = 2**16 - 1
WRITE_OUT_S = 2.0  # for the last bytes of answers after the engine has stopped
BATCHING = "matquant.serve.batching"  # its ``start(engine, **limits)`` returns the Batcher
Start = Callable[..., Batcher]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a server, as ``matquant serve --help`` explains them."""

    directory: Path
    engine: Mapping[str, Any]  # options of Engine
    batching: Mapping[str, Any]  # options of batching.start
    host: str
    port: int
    name: str | None
    widths: Sequence[int] | None
    plans: Sequence[str]
    context: int | None
    answer_tokens: int
    api_keys: Sequence[str]
    origins: Sequence[str]
    hosts: Sequence[str]
    body_bytes: int
    tool_form: str | None
    drain_s: float


def serve(settings: Settings, *, start: Start | None = None) -> None:
    """Serve until a signal comes. start: makes the batcher. InputError for anything that cannot be used."""
    if settings.tool_form is not None and settings.tool_form not in FORMS:
        raise InputError(f"--tool-format {settings.tool_form!r} is not known; use one of {', '.join(FORMS)}")
    check_speculate(settings.batching.get("speculate", OFF))
    if any(not key for key in settings.api_keys):
        raise InputError("--api-key is empty; give a key, or leave it out")
    name = model_name(settings.name, settings.directory)
    _check_memory(settings.batching.get("kv_bytes"))
    with contextlib.closing(bind(settings.host, settings.port)) as listener:
        with Log("serve") as log:
            service = _load(settings, name, start or _start, lambda text: log.at(text, text))
        app = make_app(service, _limits(settings))
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_run(service, app, listener, settings))


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, not listening yet. InputError if it is taken or not of this machine."""
    if not 0 <= port <= MOST_PORT:
        raise InputError(f"--port {port} is no port; use 0 (any free one) to {MOST_PORT}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host} is no address ({error}); use another") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        # SO_REUSEADDR lets two sockets bind until one listens: listening shows now whether the port is taken.
        listener.listen(0)
    except OSError as error:
        listener.close()
        other = "--host" if error.errno == errno.EADDRNOTAVAIL else "--port"
        raise InputError(f"cannot listen on {host} port {port} ({error.strerror}); use another {other}") from None
    return listener


def _load(settings: Settings, name: str, start: Start, report: Callable[[str], None]) -> Service:
    """Return the service: the engine loaded, its widths measured, its batcher started."""
    report(f"loading {settings.directory}")
    warm()  # a process for chat templates
    engine = Engine(settings.directory, **settings.engine)
    vocabulary, context = engine.vocabulary, check_context(settings.context, engine)
    plans = read_plans(settings.plans, engine)
    most_bits = settings.engine.get("max_bits", MASTER_BITS)

    def listed() -> list[int]:
        return listed_widths(settings.widths, engine, most_bits=most_bits)

    def offered(costs: Costs) -> Models:
        return offer(engine, name=name, widths=listed(), plans=plans, context=context, costs=costs)

    report("measuring the speed of each width")
    costs = measure(engine, drafting([*listed(), engine.max_bits], engine), most_rows=ROWS, plans=plans)
    models, held_bits = offered(costs), engine.max_bits
    report("starting the engine")
    given = {name: value for name, value in settings.batching.items() if value is not None}
    batcher = start(engine, costs=costs, note=_say, **given)
    template = vocabulary.named_templates.get(WITH_TOOLS, vocabulary.chat_template)
    service = Service(
        engine=engine,
        batcher=batcher,
        models=models,
        metrics=Metrics(batcher, model_name=name),
        context=context,
        answer_tokens=settings.answer_tokens,
        fingerprint=fingerprint(engine),
        tool_form=settings.tool_form or probe(template),
    )

    def widen(costs: Costs) -> None:
        batcher.widen(costs)
        service.models = offered(costs)

    Arrivals(
        service=service, most_bits=most_bits, widths=listed, rows=ROWS, offer=widen, note=_say, offered=held_bits
    ).start()
    return service


def _start(engine: Engine, **limits: Any) -> Batcher:
    """Start the engine side, whose module is imported only here."""
    batcher: Batcher = importlib.import_module(BATCHING).start(engine, **limits)
    return batcher


def fingerprint(engine: Engine) -> str:
    """Return what identifies weights and arithmetic, such as b-1a2b3c4d-avx512-int8."""
    manifest = engine.path / MANIFEST
    facts = manifest if manifest.is_file() else engine.path / "config.json"
    sha = hashlib.sha256(facts.read_bytes()).hexdigest()[:8]
    return f"b-{sha}-{_native.isa()}-{'float' if engine.exact else 'int8'}"


def _limits(settings: Settings) -> Limits:
    """Return the limits of requests. A loopback address answers to its names only, unless others are allowed."""
    is_local = settings.host in LOOPBACK
    return Limits(
        api_keys=settings.api_keys,
        hosts=(*LOOPBACK, *settings.hosts) if is_local or settings.hosts else (),
        origins=settings.origins,
        body_bytes=settings.body_bytes,
    )


def _check_memory(kv_bytes: int | None) -> None:
    """Raise InputError if the key/value memory is more than the machine has left."""
    left = available_bytes()
    if kv_bytes is not None and left is not None and kv_bytes > left:
        raise InputError(
            f"--kv-bytes {kv_bytes:,} exceeds the {left:,} bytes of memory that are free; "
            "use less, or close other programs"
        )


# ------------------------------------------------------------------------------------------------------------- running


class _Server(uvicorn.Server):
    """uvicorn's server without its handling of signals, which ends answers and exits as a killed process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _run(service: Service, app: ASGIApp, listener: socket.socket, settings: Settings) -> None:
    """Answer until a signal comes, then drain."""
    stopping = asyncio.Event()
    _on_signals(stopping)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=int(WRITE_OUT_S),
    )
    server = _Server(config)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    waiting = asyncio.ensure_future(stopping.wait())
    _say_ready(service, listener, settings)
    await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
    if stopping.is_set():
        await drain(service, settings.drain_s)
        server.should_exit = True
    waiting.cancel()
    await serving


async def drain(service: Service, drain_s: float) -> None:
    """Admit nothing more; return when the running answers have been written, or were ended after ``drain_s``."""
    service.is_draining = True
    _say(f"stopping within {drain_s:g} s; requests being answered: {service.active}")
    await asyncio.to_thread(service.batcher.stop, drain_s)
    end = asyncio.get_running_loop().time() + WRITE_OUT_S
    while service.active and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.02)


def _on_signals(stopping: asyncio.Event) -> None:
    def stop() -> None:
        if stopping.is_set():
            os._exit(INTERRUPTED)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C ends the process
            asyncio.get_running_loop().add_signal_handler(number, stop)


def _say_ready(service: Service, listener: socket.socket, settings: Settings) -> None:
    host, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    models = service.models
    speeds = ", ".join(f"int{bits} {models.tokens_per_s[str(bits)]:.0f}" for bits in models.widths)
    _say(f"{models.name} at http://{where}:{port}/v1, playground at http://{where}:{port}/ (tokens/s: {speeds})")
    if settings.host not in LOOPBACK and not settings.api_keys:
        _say("note: anyone who reaches this address can use the server; --api-key sets a key")


def _say(text: str) -> None:
    print(f"serve: {text}", file=sys.stderr, flush=True)
