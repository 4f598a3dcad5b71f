"""Prompts read at int8 and answers written at fewer bits (--prefill-bits of matquant serve): what it does for quality.

    python bench/prefill.py CHECKPOINT --text FILE [--widths 6,4,3,2 --context 256 --tokens 64 --windows 16 --keep]

Each window of the text is a context and the tokens that follow it. The context is read at the width or at int8, the
tokens always at the width, from the last one of the context on, as the server does it. Figures are means over all
tokens: nats per token (log-perplexity), nats of KL divergence from int8 throughout, and the share of tokens at which
the most probable token is that of int8. Prompts cost the same at every width, so what is gained costs nothing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from matquant import _native
from matquant.engine.engine import Engine
from origin import ROOT, append_record, origin

RECORDS = ROOT / "bench" / "prefill.jsonl"
WIDE = 8


def logprobs(engine: Engine, ids: list[int], *, context: int, reads: int, writes: int) -> np.ndarray:
    """Return log-probabilities, float64 [tokens, vocab], after each token from the last one of the context on."""
    session = engine.session(len(ids))
    session.extend(ids[: context - 1], engine.widths(reads))
    logits = session.extend(ids[context - 1 : -1], engine.widths(writes), all_logits=True).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    found: np.ndarray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found


def compare(found: np.ndarray, wide: np.ndarray, targets: list[int]) -> tuple[float, float, float]:
    """Return nats per token, KL divergence from ``wide``, and how often the most probable tokens agree."""
    nats = -found[np.arange(len(targets)), targets].mean()
    divergence = (np.exp(wide) * (wide - found)).sum(axis=1).mean()
    return float(nats), float(divergence), float((found.argmax(axis=1) == wide.argmax(axis=1)).mean())


def measure(engine: Engine, ids: list[int], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the figures of each width, by the width at which the context is read."""
    length = options.context + options.tokens
    cases = [(WIDE, WIDE), *((reads, bits) for bits in options.widths for reads in (bits, WIDE))]
    sums: dict[tuple[int, int], list[tuple[float, float, float]]] = {case: [] for case in cases}
    for window in range(options.windows):
        text = ids[window * length : (window + 1) * length]
        wide = logprobs(engine, text, context=options.context, reads=WIDE, writes=WIDE)
        for reads, writes in cases:
            own = logprobs(engine, text, context=options.context, reads=reads, writes=writes)
            sums[reads, writes].append(compare(own, wide, text[options.context :]))
    rows = {}
    for (reads, writes), values in sums.items():
        nats, divergence, top = np.mean(values, axis=0)
        rows[f"int{writes}, context at int{reads}"] = {"nats": nats, "divergence": divergence, "top": top}
    return rows


def table(rows: dict[str, dict[str, Any]]) -> Table:
    made = Table(*("width", "nats per token", "KL from int8", "same first token"))
    for name, row in rows.items():
        made.add_row(name, f"{row['nats']:.3f}", f"{row['divergence']:.3f}", f"{row['top']:.1%}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--widths", type=lambda text: [int(part) for part in text.split(",")], default=[6, 4, 3, 2])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    engine = Engine(options.checkpoint, threads=options.threads, check_hashes=False)
    ids = engine.vocabulary.plain(options.text.read_text(encoding="utf-8")[: 2**20])
    rows = measure(engine, ids, options)
    Console(width=120).print(table(rows))
    about = {"checkpoint": options.checkpoint.name, "isa": _native.isa(), "windows": options.windows}
    line = json.dumps({**origin(), **about, "context": options.context, "tokens": options.tokens, "widths": rows})
    print(line)
    if options.keep:
        append_record(RECORDS, line)


if __name__ == "__main__":
    main()
