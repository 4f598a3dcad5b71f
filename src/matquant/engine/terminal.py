"""Run ``matquant generate`` and ``matquant chat`` on a terminal."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matquant.core.nest import check_bits
from matquant.core.spec import Plan
from matquant.engine.chat import Conversation
from matquant.engine.completion import Completion
from matquant.engine.engine import Engine
from matquant.engine.speculation import OFF, check_speculate
from matquant.hf import renderer
from matquant.system.errors import InputError, check_positive
from matquant.system.files import MARK
from matquant.system.startup import INTERRUPTED

COMMANDS = "/bits N switches the width, /quit ends"


def generate(
    directory: Path,
    prompt: str,
    *,
    bits: int | None,
    plan: Path | None,
    engine: dict[str, Any],
    speculate: str | int = OFF,
    **options: Any,
) -> int:
    """Stream the continuation of ``prompt`` to stdout and its speed to stderr; return the exit code."""
    check_speculate(speculate)
    served = _open(directory, bits, plan, engine)
    reply = served.stream(prompt, bits=bits, plan=_read_plan(plan, bits), speculate=speculate, **options)
    _, code = _show(reply, _width(served, bits, plan))
    return code


def chat(
    directory: Path,
    *,
    bits: int | None,
    plan: Path | None,
    system: str,
    engine: dict[str, Any],
    context: int | None = None,
    speculate: str | int = OFF,
    read: Callable[[str], str] = input,
    **options: Any,
) -> int:
    """Talk to the model until /quit or the end of the input; return the exit code."""
    check_speculate(speculate)
    if context is not None:
        check_positive(context=context)
    renderer.warm()
    served = _open(directory, bits, plan, engine)
    options |= {"speculate": speculate, "context": context}
    talk = Conversation(served, bits=bits, plan=_read_plan(plan, bits), system=system, **options)
    _note(f"{directory}, {_width(served, bits, plan)}; {COMMANDS}")
    while True:
        try:
            text = read("> ").removeprefix(MARK).strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            return INTERRUPTED
        except UnicodeDecodeError as error:
            raise InputError(f"the input is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
        if text == "/quit":
            return 0
        try:
            if text.startswith("/"):
                talk.bits, talk.plan = _command(served, text), None
                _note(f"int{talk.bits} from here on")
            elif text:
                width = _width(served, talk.bits, plan if talk.plan else None)
                said, _ = _show(talk.ask(text), width)  # Ctrl-C ends the reply, not the conversation
                talk.answered(said)
        except InputError as error:
            _note(str(error))
        except KeyboardInterrupt:  # before the first token
            _note("interrupted")


def _open(directory: Path, bits: int | None, plan: Path | None, engine: dict[str, Any]) -> Engine:
    """Check the options that need no model, then return the engine."""
    if bits is not None:
        check_bits(bits)
    _read_plan(plan, bits)
    return Engine(directory, **engine)


def _read_plan(file: Path | None, bits: int | None) -> Plan | None:
    if file is not None and bits is not None:
        raise InputError(f"--bits {bits} and --plan {file} exclude each other; use one of them")
    return Plan.read(file) if file is not None else None


def _width(engine: Engine, bits: int | None, plan: Path | None) -> str:
    return f"plan {plan.name}" if plan is not None else f"int{bits or engine.max_bits}"


def _command(engine: Engine, text: str) -> int:
    """Return the width that /bits N selects."""
    name, _, number = text.partition(" ")
    if name != "/bits" or not number.strip().isdecimal():
        raise InputError(f"{text!r} is not a command; {COMMANDS}")
    bits = int(number)
    check_bits(bits)
    engine.widths(bits)
    return bits


def _show(reply: Completion, width: str) -> tuple[str, int]:
    """Print a reply as it comes; return the printed text and the exit code."""
    shown: list[str] = []
    code = 0
    try:
        for piece in reply:
            shown.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        code = INTERRUPTED
    print(flush=True)
    speed = (reply.tokens - 1) / reply.decode_s if reply.tokens > 1 else 0.0
    _note(
        f"{reply.prompt_tokens} + {reply.tokens} tokens at {width}, {speed:.1f} tokens/s"
        + (f", {reply.accepted} of {reply.drafted} drafts accepted in {reply.steps} steps" if reply.drafted else "")
        + (", interrupted" if code else "")
    )
    return "".join(shown), code


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
