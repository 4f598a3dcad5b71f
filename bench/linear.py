"""One matrix-vector product at every width, as a fraction of the speed at which this machine streams memory.

    python bench/linear.py [--rows 32768 --columns 8192 --threads 2 --tokens 1 --group 0 --rounds 15]

Correctness comes first: every width must equal the definition to 16 units of 2^-24 sum |x| |w| on some rows. Then the
widths and the streaming limit take turns, so that a change of load meets all of them; a sample counts as undisturbed
if the process had its cores for at least 97 % of the time, and medians are over those if there are three or more.
The weight must be larger than any cache at every width: the default is 268 MB at int8, 67 MB at int2.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from matquant import _native
from matquant.planes import bits_read, isa, load_weight, matmul
from matquant.tensor import NestedTensor

WIDTHS = (2, 3, 4, 6, 8)
STREAM_BYTES = 256 * 2**20
UNDISTURBED = 0.97
UNITS = 16


def random_tensor(rows: int, columns: int, group: int) -> NestedTensor:
    generator = np.random.default_rng(0)
    groups = columns // (group or columns)
    codes = generator.integers(0, 256, (rows, columns), dtype=np.uint8)
    scale = generator.uniform(0.5, 1.5, (rows, groups)).astype(np.float16).astype(np.float32)
    return NestedTensor(codes=codes, scale=scale, zero=np.full_like(scale, 128), rule="prefix")


def error_units(tensor: NestedTensor, x: np.ndarray, y: np.ndarray, bits: int) -> float:
    """Largest error of the first 64 rows in units of 2^-24 sum |x| |w|, activations as integers with scale 1."""
    part = NestedTensor(codes=tensor.codes[:64], scale=tensor.scale[:64], zero=tensor.zero[:64], rule=tensor.rule)
    weight = part.read(bits).astype(np.float64)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(weight).T
    return float((np.abs(y[:, :64] - x.astype(np.float64) @ weight.T) / (2.0**-24 * magnitude)).max())


def timed(call: Callable[[], object], threads: int) -> tuple[float, bool]:
    """Seconds, and whether the process had its cores for itself."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    seconds = time.perf_counter() - wall
    return seconds, time.process_time() - cpu >= UNDISTURBED * threads * seconds


def median(samples: list[tuple[float, bool]]) -> float:
    clean = [seconds for seconds, undisturbed in samples if undisturbed]
    return statistics.median(clean if len(clean) >= 3 else [seconds for seconds, _ in samples])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 32768), ("columns", 8192), ("threads", 2), ("tokens", 1), ("group", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    tensor = random_tensor(asked.rows, asked.columns, asked.group)
    weight = load_weight(tensor)
    x = np.random.default_rng(1).integers(-127, 128, (asked.tokens, asked.columns)).astype(np.float32)
    x[:, ::128] = 127  # the scale of every group is 1, and rounding exact

    def product(bits: int) -> np.ndarray:
        return matmul(weight, x, bits=bits, threads=asked.threads)

    for bits in WIDTHS:
        y = product(bits)
        if not error_units(tensor, x, y, bits) <= UNITS < error_units(tensor, x, y, bits - 1 if bits > 2 else 3):
            raise SystemExit(f"int{bits} is not the definition's product: nothing was timed")
    stream = _native.Stream(STREAM_BYTES)
    samples: dict[int, list[tuple[float, bool]]] = {bits: [] for bits in WIDTHS}
    limits: list[tuple[float, bool]] = []
    for _ in range(asked.rounds):
        limits.append(timed(lambda: stream.read(asked.threads), asked.threads))
        for bits in WIDTHS:
            samples[bits].append(timed(lambda bits=bits: product(bits), asked.threads))  # type: ignore[misc]

    limit = stream.bytes / median(limits)
    table = Table("bits", "ms", "GB/s", "of the limit", "against int8")
    widths: dict[str, dict[str, float]] = {}
    for bits in WIDTHS:
        seconds, eight = median(samples[bits]), median(samples[8])
        speed = asked.rows * asked.columns * bits_read(bits, rule="prefix") / 8 / seconds
        widths[str(bits)] = {"ms": seconds * 1e3, "gb_s": speed / 1e9, "fraction": speed / limit, "x8": eight / seconds}
        table.add_row(str(bits), *(f"{value:.2f}" for value in widths[str(bits)].values()))
    clean = sum(undisturbed for values in samples.values() for _, undisturbed in values) / (asked.rounds * len(WIDTHS))
    console = Console()
    console.print(table)
    console.print(f"streaming limit {limit / 1e9:.1f} GB/s; {clean:.0%} of the samples undisturbed; {isa()}")
    record = {"stream_gb_s": limit / 1e9, "undisturbed": clean, "isa": isa(), "machine": platform.processor()}
    print(json.dumps({**vars(asked), **record, "widths": widths}))


if __name__ == "__main__":
    main()
