"""One matrix product at every width, as a fraction of the speed at which this machine streams memory.

    python bench/linear.py [--rows 32768 --columns 8192 --threads 2 --tokens 1 --group 0 --rounds 15]
    python bench/linear.py --tokens 1,2,4,8,16,24 --keep    # what a batch costs; the record goes to bench/linear.jsonl
    python bench/linear.py --grid uniform,companded         # grids side by side: the last column is over the first one

Correctness comes first: every grid and width must equal the definition to 16 units of 2^-24 sum |x| |w| on some rows.
Then the grids, the batches, the widths and the streaming limit take turns, so that a change of load meets all of them.
A sample counts as undisturbed if the process had its cores for at least 97 % of the time, and medians are over those if
there are three or more (matquant.engine.bench). A ratio of grids is the median of those of the rounds in which both
were undisturbed, or of all if these are fewer than three. The weight must be larger than any cache at every width: the
default is 268 MB at int8, 67 MB at int2. MATQUANT_ISA chooses the instruction set.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from functools import partial

import numpy as np
from rich.console import Console
from rich.table import Table

from matquant import _native
from matquant.core.nest import KERNEL_GRIDS, UNIFORM, bits_read
from matquant.core.planes import Weight, isa, load_weight, matmul
from matquant.core.tensor import NestedTensor
from matquant.engine.bench import STREAM_BYTES, Sample, median, timed
from origin import ROOT, append_record, origin

WIDTHS = (2, 3, 4, 6, 8)
UNITS = 16
RECORDS = ROOT / "bench" / "linear.jsonl"

Samples = dict[tuple[str, int, int], list[Sample]]  # by grid, width and tokens


def random_tensor(rows: int, columns: int, group: int, *, grid: str = UNIFORM) -> NestedTensor:
    generator = np.random.default_rng(0)
    groups = columns // (group or columns)
    codes = generator.integers(0, 256, (rows, columns), dtype=np.uint8)
    scale = generator.uniform(0.5, 1.5, (rows, groups)).astype(np.float16).astype(np.float32)
    return NestedTensor(codes=codes, scale=scale, zero=np.full_like(scale, 128), rule="prefix", grid=grid)


def error_units(tensor: NestedTensor, x: np.ndarray, y: np.ndarray, bits: int) -> float:
    """Largest error of the first 64 rows in units of 2^-24 sum |x| |w|, activations as integers with scale 1."""
    first = {"codes": tensor.codes[:64], "scale": tensor.scale[:64], "zero": tensor.zero[:64]}
    slices = {width: (scale[:64], zero[:64]) for width, (scale, zero) in tensor.slices.items()}
    weight = NestedTensor(**first, rule=tensor.rule, grid=tensor.grid, slices=slices).read(bits).astype(np.float64)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(weight).T
    return float((np.abs(y[:, :64] - x.astype(np.float64) @ weight.T) / (2.0**-24 * magnitude)).max())


def check_products(
    tensor: NestedTensor, weight: Weight, *, tokens: int = 1, threads: int = 0, widths: Sequence[int] = WIDTHS
) -> np.ndarray:
    """SystemExit unless each width of ``weight`` is the definition's and no neighbour's; the x_TK they were given."""
    x = np.random.default_rng(1).integers(-127, 128, (tokens, tensor.codes.shape[1])).astype(np.float32)
    x[:, ::64] = 127  # the scale of every group of 64 or 128 is 1, and rounding exact
    for bits in widths:
        y = matmul(weight, x, bits=bits, threads=threads)
        if not error_units(tensor, x, y, bits) <= UNITS < error_units(tensor, x, y, bits - 1 if bits > 2 else 3):
            raise SystemExit(f"int{bits} is not the definition's product: nothing was timed")
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 32768), ("columns", 8192), ("threads", 2), ("group", 0), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", default="1", help="of a product; several, with commas, take turns")
    parser.add_argument("--grid", default=UNIFORM, help=f"{', '.join(KERNEL_GRIDS)}; several, with commas, take turns")
    parser.add_argument("--keep", action="store_true", help="append to bench/linear.jsonl")
    asked = parser.parse_args()
    batches = [int(count) for count in asked.tokens.split(",")]
    samples, limits = measure(asked.grid.split(","), batches, asked)
    limit = median(limits)
    table = Table("grid", "bits", "tokens", "ms", "GB/s", "of the limit", "against int8", f"over {batches[0]} tokens")
    table.add_column(f"over {asked.grid.split(',')[0]}")
    rows = []
    for grid, bits, count in samples:
        rate = median(samples[grid, bits, count])
        speed = asked.rows * asked.columns * bits_read(bits, rule="prefix") / 8 * rate
        values = {"ms": 1e3 / rate, "gb_s": speed / 1e9, "fraction": speed / limit}
        values |= {"x8": rate / median(samples[grid, 8, count])}
        values |= {"times_first": median(samples[grid, bits, batches[0]]) / rate}
        values |= {"over_first": ratio(samples[grid, bits, count], samples[asked.grid.split(",")[0], bits, count])}
        rows.append({"grid": grid, "bits": bits, "tokens": count, **values})
        table.add_row(grid, str(bits), str(count), *(f"{value:.2f}" for value in values.values()))
    clean = statistics.fmean(sample.undisturbed for values in samples.values() for sample in values)
    console = Console(width=120)
    console.print(table)
    console.print(f"streaming limit {limit / 1e9:.1f} GB/s; {clean:.0%} of the samples undisturbed; {isa()}")
    record = {"stream_gb_s": limit / 1e9, "undisturbed": clean, "isa": isa(), "threads": asked.threads}
    sizes = {"rows": asked.rows, "columns": asked.columns, "group": asked.group, "rounds": asked.rounds}
    line = json.dumps({**origin(), **sizes, **record, "products": rows}, sort_keys=True)
    if asked.keep:
        append_record(RECORDS, line)
    print(line)


def measure(grids: list[str], batches: list[int], asked: argparse.Namespace) -> tuple[Samples, list[Sample]]:
    """Samples of products/s of each grid, width and batch, and of the stream, in rounds."""
    weights, inputs = {}, {}
    for grid in grids:
        tensor = random_tensor(asked.rows, asked.columns, asked.group, grid=grid)
        weights[grid] = load_weight(tensor)
        for count in batches:
            inputs[count] = check_products(tensor, weights[grid], tokens=count, threads=asked.threads)
    stream = _native.Stream(STREAM_BYTES)
    samples: Samples = {(grid, bits, count): [] for grid in grids for bits in WIDTHS for count in batches}
    limits: list[Sample] = []
    for turn in range(asked.rounds):
        limits.append(timed(partial(stream.read, asked.threads), stream.bytes, asked.threads))
        for bits in WIDTHS:
            for count, x in inputs.items():
                for grid in grids if turn % 2 == 0 else reversed(grids):
                    product = partial(matmul, weights[grid], x, bits=bits, threads=asked.threads)
                    samples[grid, bits, count].append(timed(product, 1, asked.threads))
    return samples, limits


def ratio(over: list[Sample], under: list[Sample]) -> float:
    """Median over rounds, the undisturbed ones if there are three."""
    pairs = list(zip(over, under, strict=True))
    clean = [(one, other) for one, other in pairs if one.undisturbed and other.undisturbed]
    return statistics.median(one.value / other.value for one, other in (clean if len(clean) >= 3 else pairs))


if __name__ == "__main__":
    main()
