"""Render chat templates within limits of time, memory and size, in processes that do nothing else.

A template is a program that comes with a checkpoint. jinja2's sandbox protects only files and Python's internals.
Nested loops, ``'%1000000000d' % 1``, ``center``, ``tojson(indent=...)``, doubling strings and lists, big powers and
recursion can take any amount of time and memory, most of them in one C operation that neither a signal nor another
thread can stop. Counting steps and sizes inside the interpreter would need a list of every such operation; the
operating system can limit them all. So templates are rendered in a separate process (template_worker.py) that can be
killed:

- SECONDS, by a watchdog inside the process, which works in worker threads and on every system; the process is started
  again for the next request.
- MEMORY_BYTES of address space (Linux; macOS and Windows have no such limit, so only SECONDS bounds memory there).
- CHARACTERS of output, counted as it is produced.

Cost: starting a bare interpreter with jinja2 takes 0.1 s, which ``warm`` hides behind the loading of weights; then
about a millisecond per turn. At most WORKERS processes are alive, each used by one thread at a time; they end with this
process. A frozen application without a Python interpreter cannot start them and gets an InputError.
"""

import atexit
import contextlib
import marshal
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jinja2
import markupsafe

from matquant.hf import template_worker
from matquant.hf.template_worker import NO_MEMORY, READY, REJECTED, REPLY, REQUEST, TEXT, TOO_LONG
from matquant.system.errors import InputError

SECONDS = 5.0
MEMORY_BYTES = 2**29
CHARACTERS = 2**24  # far more than any context holds
REQUEST_BYTES = 2**26  # template and conversation
WORKERS = 4
BOOT = "import runpy, sys; del sys.argv[0]; sys.path += sys.argv[4:]; runpy.run_path(sys.argv[0], run_name='__main__')"
TIMED_OUT = 1  # exit code of faulthandler's watchdog

INSTEAD = "replace the template, or use matquant generate"
FAULTS = {
    REJECTED: "the model's chat template rejects this conversation ({reason}); change it",
    TOO_LONG: f"the model's chat template writes more than {CHARACTERS:,} characters; {INSTEAD}",
    NO_MEMORY: f"the model's chat template needs more than {MEMORY_BYTES // 2**20} MiB of memory; {INSTEAD}",
}


def render_template(source: str, variables: Mapping[str, Any]) -> str:
    """Render a jinja2 template with plain data; InputError if it fails or exceeds a limit. Thread-safe."""
    try:
        request = marshal.dumps((source, dict(variables)))
    except ValueError:
        raise InputError(
            "the conversation is nested too deeply for a chat template; give plain lists and dicts"
        ) from None
    if len(request) > REQUEST_BYTES:
        raise InputError(
            f"the conversation and its chat template have {len(request):,} bytes, but at most {REQUEST_BYTES:,} can be "
            "rendered; shorten the conversation, or replace the template"
        )
    with _pool.worker() as worker:
        status, reply = worker.ask(request)
    text = reply.decode("utf-8", "surrogatepass")
    if status != TEXT:
        raise InputError(FAULTS[status].format(reason=text))
    return text


def warm() -> None:
    """Start a process now, so that the first ``render_template`` finds it ready. Does not wait."""
    _pool.warm()


class _Worker:
    """One process and its pipes. A missing reply raises InputError, after which the worker is unusable."""

    def __init__(self) -> None:
        packages = {str(Path(package.__path__[0]).parent) for package in (jinja2, markupsafe)}
        limits = (str(SECONDS), str(MEMORY_BYTES), str(CHARACTERS))
        command = [sys.executable, "-I", "-S", "-c", BOOT, template_worker.__file__, *limits, *sorted(packages)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"the process that renders chat templates cannot be started ({error}); free some memory, "
                "and use a Python interpreter that programs can start"
            ) from None
        self._is_ready = False
        self.is_usable = True

    def ask(self, request: bytes) -> tuple[bytes, bytes]:
        """Send a request; return the status and bytes of the reply."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.is_usable = False  # until the reply is complete
        if not self._is_ready:
            if self._process.stdout.read(1) != READY:
                code = self._process.wait()
                raise InputError(
                    f"the process that renders chat templates did not start (exit code {code}); "
                    f"check that {sys.executable} runs and jinja2 is installed correctly"
                )
            self._is_ready = True
        try:
            self._process.stdin.write(REQUEST.pack(len(request)) + request)
            self._process.stdin.flush()
            status, size = REPLY.unpack(_read(self._process.stdout, REPLY.size))
            reply = _read(self._process.stdout, size)
        except (OSError, EOFError):
            raise InputError(self._ending()) from None
        self.is_usable = status != NO_MEMORY
        return status, reply

    def _ending(self) -> str:
        """Return why the process ended in the middle of a request."""
        code = self._process.wait()
        if code == TIMED_OUT:
            return f"the model's chat template did not finish within {SECONDS:g} s; {INSTEAD}"
        return f"the model's chat template crashed the process that renders it (exit code {code}); {INSTEAD}"

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def disown(self) -> None:
        """Forget the process in a forked child: it belongs to the parent."""
        self._process.returncode = 0
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # unwritten bytes are lost
                pipe.close()  # type: ignore[union-attr]


class _Pool:
    """Idle workers, and one slot for each that may be alive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(WORKERS)
        self._idle: list[_Worker] = []

    @contextlib.contextmanager
    def worker(self) -> Iterator[_Worker]:
        """Yield a worker for one request; it is kept for the next request if still usable."""
        with self._slots:
            worker = self._take() or _Worker()
            try:
                yield worker
            finally:  # also after Ctrl-C in the middle of a reply
                if worker.is_usable:
                    with self._lock:
                        self._idle.append(worker)
                else:
                    worker.close()

    def _take(self) -> _Worker | None:
        while True:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None or not worker.has_ended():
                return worker
            worker.close()

    def warm(self) -> None:
        with self._lock:
            if not self._idle:
                self._idle.append(_Worker())

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()

    def disown(self) -> None:
        for worker in self._idle:
            worker.disown()


def _read(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) != size:
        raise EOFError
    return data


def _after_fork() -> None:
    global _pool
    _pool.disown()
    _pool = _Pool()


_pool = _Pool()
atexit.register(lambda: _pool.close())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
