"""Tokens per second, and the widths that tokens get, of a model with experts in a budget of memory.

    python bench/experts.py DIRECTORY

DIRECTORY: where the model is written, 0.5 GB, unless it is there. It has random weights, LAYERS layers of EXPERTS
experts, ACTIVE for each token. Routing is skewed: in each layer expert number n in a random order has log-odds
-log(n), as in Zipf's law, plus noise of each token. For this all embeddings share one large input, which the router
reads as the constant 1. Random tokens are decoded at int8.

Every budget has an engine with one thread. They take turns for ROUNDS rounds after WARM_TOKENS tokens each. A rate is
tokens per second of CPU time of the process, which includes reading and packing planes; "ratio" is the median over
rounds of the rate over that of the engine that holds everything. Widths and swaps are of the measured rounds.
"""

import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import typer

import decode
from matquant.engine.engine import Engine
from matquant.engine.session import Session
from matquant.hf.architecture import EMBEDDING
from origin import origin

LAYERS, EXPERTS, ACTIVE = 4, 64, 4
SHAPE: dict[str, Any] = decode.QWEN3_MOE | {
    **{"hidden_size": 1024, "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 2},
    **{"num_experts": EXPERTS, "num_experts_per_tok": ACTIVE, "moe_intermediate_size": 512, "vocab_size": 4096},
}
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)  # of what the experts need above int2
CONSTANT = 40.0  # of the shared input, in standard deviations of the others
WARM_TOKENS, ROUNDS, ROUND_TOKENS = 512, 8, 64
CONTEXT = 64


def skewed(name: str, values: np.ndarray) -> np.ndarray:
    """Return embeddings with a shared input, and routers that read Zipf's log-odds from it."""
    hidden = values.shape[1]
    typical = (1 + CONSTANT**2 / hidden) ** 0.5  # root mean square that the norm divides by
    if name.startswith(EMBEDDING):
        values[:, 0] = CONSTANT
        return values
    values *= typical  # noise of about 1
    order = np.random.default_rng(int(name.split(".")[2])).permutation(EXPERTS)
    values[order, 0] = -np.log(np.arange(1, EXPERTS + 1)) * typical / CONSTANT
    return values


def open_engines(directory: Path) -> list[Engine]:
    """Return an engine for each budget."""
    whole = Engine(directory, threads=1, resident=2**40)
    assert whole.residency is not None
    least, most = whole.residency.least_bytes, whole.residency.resident_bytes
    return [Engine(directory, threads=1, resident=round(least + share * (most - least))) for share in SHARES]


def run(session: Session, widths: np.ndarray, tokens: list[int]) -> float:
    """Decode tokens; return how many a second of CPU time."""
    began = time.process_time()
    for token in tokens:
        if len(session.ids) == CONTEXT:
            session.rewind(1)
        session.extend([token], widths)
    return len(tokens) / (time.process_time() - began)


def measure(engines: list[Engine]) -> list[dict[str, Any]]:
    """Return a row for each engine."""
    sessions = [engine.session(CONTEXT) for engine in engines]
    rates: list[list[float]] = [[] for _ in engines]
    random = np.random.default_rng(0)
    before: list[dict[str, float]] = []
    for count in (WARM_TOKENS, *[ROUND_TOKENS] * ROUNDS):
        tokens = random.integers(0, SHAPE["vocab_size"], count).tolist()
        for session, found in zip(sessions, rates, strict=True):
            found.append(run(session, session.engine.widths(8), tokens))
        before = before or [stats(engine) for engine in engines]
    rows = []
    for engine, found, old in zip(engines, rates, before, strict=True):
        new = stats(engine)
        tokens = {key[-1]: n - old.get(key, 0) for key, n in new.items() if "/" in key}
        total = sum(tokens.values())
        ratios = [rate / whole for rate, whole in zip(found[1:], rates[-1][1:], strict=True)]
        rows.append(
            {
                "mb": new["resident_bytes"] / 1e6,
                "tok_s": statistics.median(found[1:]),
                "ratio": statistics.median(ratios),
                "shares": {bits: n / total for bits, n in tokens.items()},
                "swaps": new["expert_swaps"] - old["expert_swaps"],
                "swap_mb": (new["expert_swap_bytes"] - old["expert_swap_bytes"]) / 1e6,
                "swap_mb_before": old["expert_swap_bytes"] / 1e6,
            }
        )
    return rows


def stats(engine: Engine) -> dict[str, float]:
    """Return the counts of an engine with a budget."""
    assert engine.residency is not None
    return engine.residency.stats()


def main(directory: Path) -> None:
    """Measure and print a table for docs/runtime.md, then the record."""
    if not directory.exists():
        decode.write_random(directory, SHAPE, 64, change=skewed)
    rows = measure(open_engines(directory))
    widths = sorted({bits for row in rows for bits in row["shares"]})
    print("| weights in memory, MB | tokens/s | ratio |", *(f"int{bits} |" for bits in widths), "swaps | MB read |")
    print("|---" * (5 + len(widths)) + "|")
    for row in rows:
        shares = " ".join(f"{row['shares'].get(bits, 0):.1%} |" for bits in widths)
        numbers = f"{row['mb']:.0f} | {row['tok_s']:.1f} | {row['ratio']:.2f}"
        print(f"| {numbers} | {shares} {row['swaps']} | {row['swap_mb']:.1f} |")
    print(json.dumps({"rows": rows, **origin(), "matquant": version("matquant")}, sort_keys=True))


if __name__ == "__main__":
    typer.run(main)
