"""One matrix-vector product at every width, as a fraction of the speed at which this machine streams memory.

    python bench/linear.py [--rows 32768 --columns 8192 --threads 2 --tokens 1 --group 0 --rounds 15]

Correctness comes first: every width must equal the definition to 16 units of 2^-24 sum |x| |w| on some rows. Then the
widths and the streaming limit take turns, so that a change of load meets all of them; a sample counts as undisturbed
if the process had its cores for at least 97 % of the time, and medians are over those if there are three or more
(matquant.runtime.bench).
The weight must be larger than any cache at every width: the default is 268 MB at int8, 67 MB at int2.
"""

import argparse
import json
import platform
from functools import partial

import numpy as np
from rich.console import Console
from rich.table import Table

from matquant import _native
from matquant.planes import Weight, bits_read, isa, load_weight, matmul
from matquant.runtime.bench import STREAM_BYTES, Sample, median, timed
from matquant.tensor import NestedTensor

WIDTHS = (2, 3, 4, 6, 8)
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


def check_products(tensor: NestedTensor, weight: Weight, *, tokens: int = 1, threads: int = 0) -> np.ndarray:
    """SystemExit unless each width of ``weight`` is the definition's and no neighbour's; the x_TK they were given."""
    x = np.random.default_rng(1).integers(-127, 128, (tokens, tensor.codes.shape[1])).astype(np.float32)
    x[:, ::128] = 127  # the scale of every group is 1, and rounding exact
    for bits in WIDTHS:
        y = matmul(weight, x, bits=bits, threads=threads)
        if not error_units(tensor, x, y, bits) <= UNITS < error_units(tensor, x, y, bits - 1 if bits > 2 else 3):
            raise SystemExit(f"int{bits} is not the definition's product: nothing was timed")
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 32768), ("columns", 8192), ("threads", 2), ("tokens", 1), ("group", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    tensor = random_tensor(asked.rows, asked.columns, asked.group)
    weight = load_weight(tensor)
    x = check_products(tensor, weight, tokens=asked.tokens, threads=asked.threads)

    def product(bits: int) -> None:
        matmul(weight, x, bits=bits, threads=asked.threads)

    stream = _native.Stream(STREAM_BYTES)
    samples: dict[int, list[Sample]] = {bits: [] for bits in WIDTHS}
    limits: list[Sample] = []
    for _ in range(asked.rounds):
        limits.append(timed(partial(stream.read, asked.threads), stream.bytes, asked.threads))
        for bits in WIDTHS:
            samples[bits].append(timed(partial(product, bits), 1, asked.threads))

    limit = median(limits)
    table = Table("bits", "ms", "GB/s", "of the limit", "against int8")
    widths: dict[str, dict[str, float]] = {}
    for bits in WIDTHS:
        rate, eight = median(samples[bits]), median(samples[8])
        speed = asked.rows * asked.columns * bits_read(bits, rule="prefix") / 8 * rate
        widths[str(bits)] = {"ms": 1e3 / rate, "gb_s": speed / 1e9, "fraction": speed / limit, "x8": rate / eight}
        table.add_row(str(bits), *(f"{value:.2f}" for value in widths[str(bits)].values()))
    clean = sum(sample.undisturbed for values in samples.values() for sample in values) / (asked.rounds * len(WIDTHS))
    console = Console()
    console.print(table)
    console.print(f"streaming limit {limit / 1e9:.1f} GB/s; {clean:.0%} of the samples undisturbed; {isa()}")
    record = {"stream_gb_s": limit / 1e9, "undisturbed": clean, "isa": isa(), "machine": platform.processor()}
    print(json.dumps({**vars(asked), **record, "widths": widths}))


if __name__ == "__main__":
    main()
