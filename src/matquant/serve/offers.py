"""What a server offers, found out at its start: plans, bits per weight and decoding speed of every width."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from matquant.core.spec import Plan
from matquant.engine.engine import Engine
from matquant.format.read import open_checkpoint
from matquant.format.sizes import bits_per_weight
from matquant.serve.models import LISTED, Models
from matquant.system.errors import InputError

ROUNDS, ROUND_S = 3, 0.1  # of measuring; seconds for each width
MOST_TOKENS, LEAST_TOKENS = 16, 2
CONTEXT = 2**15  # default limit of a prompt and its answer


def read_plans(given: Sequence[str], engine: Engine) -> dict[str, Plan]:
    """Return the plans of ``--plan NAME=FILE``. InputError if one is not readable or does not fit the checkpoint."""
    plans: dict[str, Plan] = {}
    for entry in given:
        name, separator, file = entry.partition("=")
        if not separator or not file or not name.replace("-", "").replace(".", "").replace("_", "").isalnum():
            raise InputError(f"--plan {entry!r} is not NAME=FILE with a name of letters, digits, -, _ and .; give both")
        if name.isdigit() or name == "auto" or (name.startswith("int") and name[3:].isdigit()) or name in plans:
            raise InputError(f"--plan {entry!r} has a name that stands for another width or plan; choose another name")
        plan = Plan.read(file)
        try:
            engine.widths(plan=plan)
        except InputError as error:
            raise InputError(f"--plan {entry}: {error}") from None
        plans[name] = plan
    return plans


def check_context(context: int | None, engine: Engine) -> int:
    """Return the limit of a prompt and its answer, tokens. InputError if the model reads less."""
    if context is None:
        return min(engine.context, CONTEXT)
    if not 1 <= context <= engine.context:
        raise InputError(f"--context {context} is not valid; use 1 to {engine.context}, the model's context")
    return context


def offer(
    engine: Engine,
    *,
    name: str,
    widths: Sequence[int] | None,
    plans: Mapping[str, Plan],
    context: int,
    report: Callable[[str], None] = lambda text: None,
) -> Models:
    """Return what the server offers; measures the speed of each width and plan, and ``report``s it.

    widths: those listed; None: LISTED. InputError for a width above the engine's max_bits.
    """
    if widths is None:
        listed = [bits for bits in LISTED if bits <= engine.max_bits] or [engine.max_bits]
    else:
        listed = sorted(set(widths), reverse=True)
        if listed[0] > engine.max_bits:
            raise InputError(
                f"--widths has {listed[0]}, above --max-bits {engine.max_bits}; leave it out, or raise the limit"
            )
    uniform = sorted({*listed, engine.max_bits}, reverse=True)
    served = {str(bits): Plan(default=bits) for bits in uniform} | dict(plans)
    tables = {label: engine.widths(plan=plan) for label, plan in served.items()}
    return Models(
        name=name,
        max_bits=engine.max_bits,
        widths=listed,
        plans=plans,
        bits_per_weight=sizes(engine, served),
        tokens_per_s=measure(engine, tables, context=context, report=report),
        context=context,
        created=int(time.time()),
    )


def sizes(engine: Engine, plans: Mapping[str, Plan]) -> dict[str, float]:
    """Return bits per weight of each plan, all overhead included; empty under rule ``extra``: it counts slowly."""
    checkpoint = open_checkpoint(engine.path, check_hashes=False)
    if checkpoint.spec.rule == "extra":
        return {}
    return {label: bits_per_weight(checkpoint, checkpoint.widths(plan)) for label, plan in plans.items()}


def measure(
    engine: Engine, widths: Mapping[str, np.ndarray], *, context: int, report: Callable[[str], None] = lambda text: None
) -> dict[str, float]:
    """Return tokens per second of one sequence at each of ``widths``: the fastest of ROUNDS rounds that take turns."""
    session = engine.session(min(context, MOST_TOKENS + 1))
    most = session.capacity - 1
    speeds = dict.fromkeys(widths, 0.0)
    for _ in range(ROUNDS):
        for label, table in widths.items():
            report("measuring the speed of each width")
            session.rewind(0)
            session.extend([0], table)  # the first time it touches every plane
            began, tokens, spent_s = time.perf_counter(), 0, 0.0
            while tokens < most and (tokens < LEAST_TOKENS or spent_s < ROUND_S):
                session.extend([0], table)
                tokens += 1
                spent_s = time.perf_counter() - began
            if tokens:
                speeds[label] = max(speeds[label], tokens / max(spent_s, 1e-9))
    return speeds


def model_name(name: str | None, directory: Path) -> str:
    """Return the name under which the model is served: given, or of its directory."""
    found = directory.resolve().name if name is None else name
    if not found or any(letter.isspace() or letter == ":" or not letter.isprintable() for letter in found):
        raise InputError(f"--name {found!r} is not valid; use letters without blanks and colons")
    return found
