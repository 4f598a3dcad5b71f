"""Render chat templates in a process with limits: the script that matquant.hf.renderer starts.

Chat templates come with a checkpoint and are not trusted. This process sees only them and the conversation. Its jinja2
environment has exactly the names, filters and tags that transformers 5 provides
(transformers/utils/chat_template_utils.py).

One request is a length and ``marshal`` bytes (plain data only; both ends are the same interpreter), one reply is a
status, a length and UTF-8. If a request takes too long, faulthandler's watchdog ends the process; it is a C thread that
needs no interpreter lock, so one huge operation cannot block it. Only the standard library and jinja2 are imported, so
that the process starts fast and without site-packages.
"""

import contextlib
import datetime
import faulthandler
import functools
import json
import marshal
import signal
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

READY = b"+"
REQUEST = struct.Struct("<Q")
REPLY = struct.Struct("<cQ")
TEXT, REJECTED, TOO_LONG, NO_MEMORY = b"t", b"r", b"l", b"m"  # statuses of a reply
REASON_CHARACTERS = 300  # maximum length of a template's error message


def main() -> None:
    """Serve requests from stdin until it ends. Arguments: seconds, bytes of memory, characters of output."""
    seconds, memory_bytes, characters = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    compiled = functools.lru_cache(maxsize=8)(make_environment().from_string)
    _limit_memory(memory_bytes)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    replies.write(READY)
    replies.flush()
    while header := requests.read(REQUEST.size):
        source, variables = marshal.loads(requests.read(*REQUEST.unpack(header)))
        faulthandler.dump_traceback_later(seconds, exit=True)
        status, text = _answer(compiled, source, variables, characters)
        faulthandler.cancel_dump_traceback_later()
        _send(replies, status, text)


def _answer(
    compiled: Callable[[str], jinja2.Template], source: str, variables: Mapping[str, Any], limit: int
) -> tuple[bytes, bytes]:
    """Return the status and text of one rendering."""
    try:
        pieces, size = [], 0
        for piece in compiled(source).generate(variables):
            size += len(piece)
            if size > limit:
                return TOO_LONG, b""
            pieces.append(piece)
        return TEXT, "".join(pieces).encode("utf-8", "surrogatepass")
    except MemoryError:
        return NO_MEMORY, b""
    except BaseException as error:
        return REJECTED, _reason(error).encode("utf-8", "replace")


def _reason(error: BaseException) -> str:
    """Return an exception's message in one printable line."""
    if isinstance(error, RecursionError):
        return "infinite recursion"
    try:
        text = str(error)
    except Exception:
        text = ""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * REASON_CHARACTERS]).split())
    short = line if len(line) <= REASON_CHARACTERS else f"{line[:REASON_CHARACTERS]}..."
    return short or type(error).__name__


def _send(replies: BinaryIO, status: bytes, text: bytes) -> None:
    replies.write(REPLY.pack(status, len(text)))
    replies.write(text)
    replies.flush()


def _limit_memory(limit: int) -> None:
    """Limit the address space to ``limit`` bytes, where the system supports it (not on Windows; macOS ignores it)."""
    if resource is None:
        return
    for kind, value in ((resource.RLIMIT_AS, limit), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


# -------------------------------------------------------------------------------------------- what transformers gives


class Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks the assistant's text for training; here it is only a block."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

    def said(self, caller: Callable[[], str]) -> str:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """``namespace()`` without underscored names, which lead to Python's internals."""

    def __init__(self, /, *args: Any, **values: Any) -> None:
        given = dict(*args, **values)
        for name in given:
            _check_name(name)
        super().__init__(given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class Dictionary:
    """``dict()`` for templates, which is not the class itself."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON without HTML escapes; arguments may be positional, in this order."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def make_environment() -> jinja2.Environment:
    """Return the jinja2 environment of transformers' chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.datetime.now().strftime(format),
        "dict": Dictionary(),
        "namespace": Namespace,
    }
    return environment


if __name__ == "__main__":
    main()
