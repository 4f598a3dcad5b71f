"""What a server offers, found out at its start: plans, and bits per weight and decoding speed of every width."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from matquant.core.spec import Plan
from matquant.engine.engine import Engine
from matquant.format.read import open_checkpoint
from matquant.format.sizes import bits_per_weight
from matquant.serve.cost import Costs
from matquant.serve.models import LISTED, Models
from matquant.system.errors import InputError

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


def listed_widths(widths: Sequence[int] | None, engine: Engine, *, most_bits: int) -> list[int]:
    """Return the widths to list, the widest first: those given, or LISTED, that are in memory.

    InputError for one above ``most_bits``; planes of others may still arrive.
    """
    if widths is None:
        return [bits for bits in LISTED if bits <= engine.max_bits] or [engine.max_bits]
    listed = sorted(set(widths), reverse=True)
    if listed[0] > most_bits:
        raise InputError(f"--widths has {listed[0]}, above --max-bits {most_bits}; leave it out, or raise the limit")
    return [bits for bits in listed if bits <= engine.max_bits] or [engine.max_bits]


def offer(
    engine: Engine, *, name: str, widths: Sequence[int], plans: Mapping[str, Plan], context: int, costs: Costs
) -> Models:
    """Return what the server offers. widths: those listed. costs: of all widths that they and the engine have."""
    known = {str(bits): Plan(default=bits) for bits in range(1, engine.max_bits + 1)} | dict(plans)
    seconds = {str(bits): costs.step_s(bits, 1) for bits in (*widths, engine.max_bits)} | dict(costs.plans)
    return Models(
        name=name,
        max_bits=engine.max_bits,
        widths=widths,
        plans=plans,
        bits_per_weight=sizes(engine, known),
        tokens_per_s={label: 1 / max(step_s, 1e-9) for label, step_s in seconds.items()},
        context=context,
        created=int(time.time()),
    )


def sizes(engine: Engine, plans: Mapping[str, Plan]) -> dict[str, float]:
    """Return bits per weight of each plan, all overhead included; empty under rule ``extra``: it counts slowly."""
    checkpoint = open_checkpoint(engine.path, check_hashes=False, partial=True)
    if checkpoint.spec.rule == "extra":
        return {}
    return {label: bits_per_weight(checkpoint, checkpoint.widths(plan)) for label, plan in plans.items()}


def model_name(name: str | None, directory: Path) -> str:
    """Return the name under which the model is served: given, or of its directory."""
    found = directory.resolve().name if name is None else name
    if not found or any(letter.isspace() or letter == ":" or not letter.isprintable() for letter in found):
        raise InputError(f"--name {found!r} is not valid; use letters without blanks and colons")
    return found
