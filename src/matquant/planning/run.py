"""Make a plan from a checkpoint, a strategy and a budget: a plan file, a table and a record."""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from matquant.core.experts import expert_name
from matquant.core.spec import ABOUT, Plan
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.format.sizes import bits_per_weight, plain_bytes, plan_bytes
from matquant.planning.budget import Budget, bits_budget, by_layer, by_width, check_widths, size_budget
from matquant.planning.search import EVALUATIONS, PAPER_WIDTHS, search, strategy_plan
from matquant.planning.strategies import check_strategy
from matquant.system.errors import InputError
from matquant.system.files import json_text, write_atomically
from matquant.system.locks import holding

if TYPE_CHECKING:
    from matquant.planning.sensitivity import Losses

SEARCH = "search"
SEARCHED_WIDTHS = (2, 3, 4, 5, 6, 8)


@holding("out")
def run(
    directory: Path,
    out: Path,
    *,
    strategy: str = SEARCH,
    widths: Sequence[int] | None = None,
    fused: bool = False,
    experts: bool = False,
    evaluations: int = EVALUATIONS,
    losses: "Losses | None" = None,
    show: Callable[[RenderableType], None] = lambda table: None,
    **budget: Any,
) -> dict[str, Any]:
    """Make one plan, write it to ``out`` and return its facts. budget: as for ``read_budget``."""
    check_output(out, "-o")
    mixed = default_widths(strategy) if widths is None else tuple(widths)
    checkpoint = losses.checkpoint if losses is not None else open_checkpoint(directory)
    plan, facts = make_plan(
        checkpoint,
        read_budget(checkpoint, widths=mixed, **budget),
        strategy=strategy,
        widths=mixed,
        losses=losses,
        fused=fused,
        experts=experts,
        evaluations=evaluations,
    )
    kept = Plan(bits=plan, default=None, about={key: value for key, value in facts.items() if key in ABOUT})
    write_atomically(out, (json_text(kept.to_json(), indent=1, sort_keys=False) + "\n").encode())
    show(layer_table(plan, f"{out}: {strategy}, {facts['budget']}"))
    words = [f"{facts['bits_per_weight']:.3f} bits per weight", f"{facts['bytes']:,} bytes"]
    if losses is not None:
        words += [f"KL {facts['loss']:.4f}, log-perplexity {facts['log_perplexity']:.4f} on the calibration text"]
        words += [f"{facts['evaluations']} evaluations"]
    words += [
        f"{found['experts']} experts at {name}, chosen {100 * found['routed']:.1f} %"
        for name, found in facts.get("experts", {}).items()
    ]
    show(", ".join([*words, f"{facts['seconds']} s"]))
    return facts


def check_plan(
    directory: Path,
    out: Path,
    *,
    strategy: str,
    experts: bool,
    widths: Sequence[int] | None,
    evaluations: int,
    tokens_per_second: float | None = None,
    **budget: Any,
) -> None:
    """Raise InputError for a plan that cannot be made, before any loss is measured; ``run`` checks a speed budget."""
    check_output(out, "-o")
    mixed = default_widths(strategy) if widths is None else tuple(widths)
    if evaluations < 0:
        raise InputError(f"--evaluations {evaluations} is not valid; use a number of at least 0")
    checkpoint = open_checkpoint(directory, check_hashes=False)
    if experts:
        check_experts(checkpoint, strategy)
    if tokens_per_second is None:
        read_budget(checkpoint, widths=mixed, **budget)


def check_experts(checkpoint: Checkpoint, strategy: str) -> None:
    """Raise InputError unless a search can choose a width for each expert."""
    if strategy != SEARCH:
        raise InputError(f"--experts measures losses, which --strategy {strategy} does not; use --strategy {SEARCH}")
    if not any(map(expert_name, checkpoint.shapes)):
        raise InputError(f"--experts needs quantised experts, and {checkpoint.directory} has none; leave it out")


def default_widths(strategy: str) -> tuple[int, ...]:
    """Return the default widths of a strategy; InputError for an unknown strategy."""
    if strategy == SEARCH:
        return SEARCHED_WIDTHS
    check_strategy(strategy)
    return PAPER_WIDTHS


def read_budget(
    checkpoint: Checkpoint,
    *,
    widths: Sequence[int],
    bits_per_weight: float | None = None,
    size: str | None = None,
    tokens_per_second: float | None = None,
) -> Budget:
    """Return the budget that is given; InputError for none or several."""
    check_widths(widths)
    given = [value for value in (bits_per_weight, size, tokens_per_second) if value is not None]
    if len(given) != 1:
        raise InputError(
            f"found {len(given)} budgets; give one of --bits-per-weight, --size and --tokens-per-second, or --pareto"
        )
    if bits_per_weight is not None:
        return bits_budget(checkpoint, bits_per_weight, widths=widths)
    if size is not None:
        return size_budget(checkpoint, size, widths=widths)
    assert tokens_per_second is not None
    # imports the engine and its kernels, which only this budget needs
    speed = importlib.import_module("matquant.planning.speed")
    budget: Budget = speed.speed_budget(checkpoint.directory, tokens_per_second, widths=widths)
    return budget


def make_plan(
    checkpoint: Checkpoint,
    budget: Budget,
    *,
    strategy: str = SEARCH,
    widths: Sequence[int],
    losses: "Losses | None" = None,
    fused: bool = False,
    experts: bool = False,
    evaluations: int = EVALUATIONS,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Return a plan {path: bits} and its facts: bits per weight, bytes, and loss and log-perplexity if ``losses`` is
    given.

    InputError if the search has no losses, the strategy is unknown or the budget is below the smallest plan.
    """
    began = time.perf_counter()
    before = losses.evaluations if losses is not None else 0
    if strategy != SEARCH:
        check_strategy(strategy)
        # strategies order layers: embedding and head have their least width
        body = budget.fixing(checkpoint.least)
        paths = [path for path in checkpoint.shapes if path not in body.fixed]
        plan = {**body.fixed, **strategy_plan(strategy, paths, body, widths=widths)}
    elif losses is None:
        raise InputError(
            "strategy='search' measures losses; give losses (sensitivity.open_losses), or another strategy"
        )
    else:
        if evaluations < 0:
            raise InputError(f"--evaluations {evaluations} is not valid; use a number of at least 0")
        groups = by_width((path for path in losses.paths if path not in budget.fixed), fused=fused, experts=experts)
        budget.table(groups, widths)  # before any estimate
        alone = int(np.isnan(losses.estimates(groups, widths)).any(1).sum())
        losses.expected = before + (alone + 1) * len(widths) + evaluations
        plan = search(losses, budget, widths=tuple(widths), fused=fused, experts=experts, evaluations=evaluations)
    facts: dict[str, Any] = {"strategy": strategy, "budget": budget.asked, **describe(checkpoint, plan, losses)}
    if losses is not None:
        facts |= {"evaluations": losses.evaluations - before}
        facts |= {"experts": expert_shares(plan, losses.routing())} if experts else {}
    return plan, {**facts, "seconds": round(time.perf_counter() - began, 2)}


def describe(checkpoint: Checkpoint, plan: Mapping[str, int], losses: "Losses | None") -> dict[str, float]:
    """Return a plan's bits per weight (all overhead included), model bytes, and losses if they are measured."""
    total = plan_bytes(checkpoint, plan) + plain_bytes(checkpoint)
    facts = {"bits_per_weight": bits_per_weight(checkpoint, plan), "bytes": int(-(-total // 1))}
    if losses is not None:
        loss, log_perplexity = losses.measure(plan)
        facts |= {"loss": loss, "log_perplexity": log_perplexity}
    return facts


def expert_shares(plan: Mapping[str, int], routing: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return how many experts have each width, and their share of the experts that tokens chose: width -> facts.

    routing: expert's name -> share of tokens that chooses it.
    """
    widths = {name: bits for path, bits in plan.items() if (name := expert_name(path)) in routing and name is not None}
    total = sum(routing.values())
    return {
        f"int{bits}": {
            "experts": sum(found == bits for found in widths.values()),
            "routed": round(sum(routing[name] for name, found in widths.items() if found == bits) / total, 4),
        }
        for bits in sorted(set(widths.values()))
    }


def layer_table(plan: Mapping[str, int], title: str) -> Table:
    """Return the widths by layer: a row per decoder layer, a column per linear layer, experts together."""
    rows = []
    layers = by_layer(plan)
    names = [str(number) for number in range(len(layers))]
    if layers and not any(part.isdecimal() for part in layers[0][0].split(".")):  # embedding and head come first
        names = ["", *names[:-1]]
    for layer in layers:
        row: dict[str, set[int]] = {}
        for path in layer:
            row.setdefault(path.rpartition(".")[2], set()).add(plan[path])
        rows.append(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title, title_justify="left")
    for name in ("layer", *columns):
        table.add_column(name, justify="right")
    for name, row in zip(names, rows, strict=True):
        table.add_row(name, *("/".join(map(str, sorted(row.get(name, ())))) for name in columns))
    return table


def check_output(file: Path, flag: str) -> None:
    """Raise InputError if ``file`` is a directory."""
    if file.is_dir():
        raise InputError(f"{flag} {file} is a directory; give a file")
