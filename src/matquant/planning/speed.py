"""Budgets in tokens per second: nanoseconds of every weight at every width, measured on this machine.

Decoding a token takes the sum of the linear layers' times plus a fixed rest. The engine's profile gives the time of
each part of the step (qkv, o, gate_up, down) at each width; a path gets a share in proportion to its rows. This is
accurate to a few percent if weights are streamed from memory; small models that stay in caches are less additive.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matquant.engine.bench import bench
from matquant.engine.engine import Engine
from matquant.planning.budget import Budget
from matquant.system.errors import check_positive

PARTS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o", "gate_proj": "gate_up", "up_proj": "gate_up"}
PARTS |= {"down_proj": "down"}
TOKENS, ROUNDS, CONTEXT = 32, 7, 16


def speed_budget(directory: Path | str, tokens_per_second: float, *, widths: Sequence[int]) -> Budget:
    """Return a budget in decoded tokens per second on this machine; measuring its cost table takes seconds."""
    check_positive(tokens_per_second=tokens_per_second)
    engine = Engine(directory, max_bits=max(widths))
    record = bench(engine, bits=widths, tokens=min(TOKENS, engine.context - CONTEXT), rounds=ROUNDS, context=CONTEXT)
    rows: dict[str, int] = {}
    fixed = dict(engine.model.least)  # embedding and head: the profile does not read them at other widths
    weights = {path: weight for path, weight in engine.model.weights.items() if path not in fixed}
    for path, weight in weights.items():
        rows[_part(path)] = rows.get(_part(path), 0) + weight.planes.rows
    costs, rests = {}, []
    for bits in widths:
        row = record["widths"][str(bits)]
        scale = 1e6 / row["tok_s"] / sum(row["parts_us"].values())  # the profile runs other steps than the timing
        for path, weight in weights.items():
            share = weight.planes.rows / rows[_part(path)]
            costs[path, bits] = round(1000 * scale * row["parts_us"][_part(path)] * share)
        rests.append(1e9 / row["tok_s"] - sum(costs[path, bits] for path in weights))
    rest = statistics.median(rests)
    return Budget(
        limit=int(1e9 / tokens_per_second - rest),
        costs=costs,
        asked=f"{tokens_per_second:g} tokens per second",
        least=lambda cost: f"{1e9 / (cost + rest):.1f} tokens per second",
        fixed=fixed,
    )


def _part(path: str) -> str:
    return PARTS[path.rpartition(".")[2]]
