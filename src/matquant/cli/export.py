"""``matquant export``."""

from pathlib import Path
from typing import Annotated

from rich.console import Console

from matquant import export as exporting
from matquant.cli.arguments import BaseModel, Directory, Measured, Option, PlanFile, notice
from matquant.core.spec import Plan
from matquant.export import explain as explaining
from matquant.format.read import open_checkpoint
from matquant.system import progress
from matquant.system.errors import InputError


def export(
    directory: Directory,
    to: Annotated[
        str | None, Option(help="Format: gguf, mlx, compressed-tensors, gptq, gptq_v2, dense, matquant or planes.")
    ] = None,
    out: Annotated[Path | None, Option("--out", "-o", metavar="OUT", help="File or directory to write.")] = None,
    bits: Annotated[int | None, Option(help="Width to export.", show_default="8")] = None,
    plan: PlanFile = None,
    zero_point: Annotated[
        str, Option(help="Zero-points: exact, or midrange (moved to mid-range, for formats that store none).")
    ] = "exact",
    dtype: Annotated[
        str | None,
        Option(
            help="Dtype of dense weights (and of mlx's scales): float32, bfloat16 or float16.",
            show_default="the model's",
        ),
    ] = None,
    base_model: BaseModel = None,
    measured: Measured = None,
    requantise: Annotated[
        bool, Option("--requantise", help="Fit companded and float slices to the format, at a loss that is printed.")
    ] = False,
    split_experts: Annotated[
        bool, Option("--split-experts", help="With --to dense, write experts that share a tensor apart.")
    ] = False,
    explain: Annotated[
        bool, Option("--explain", help="Print how each format would store int8, 6, 4, 3 and 2, and write nothing.")
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write a slice for llama.cpp, MLX, vLLM, transformers or GPTQModel, if the format holds it exactly; or planes."""
    wanted = Plan.read(plan) if plan is not None else None
    if explain:
        _explain(directory, wanted, zero_point, requantise=requantise)
        return
    if to is None or out is None:
        raise InputError(f"export needs --to and -o; give --to {' or '.join(exporting.FORMATS)} and -o OUT")
    with progress.transferring("export", "written") as report:
        made = exporting.export(
            directory,
            out,
            to=to,
            bits=bits,
            plan=wanted,
            zero_point=zero_point,
            dtype=dtype,
            base_model=base_model,
            measured=measured,
            requantise=requantise,
            split_experts=split_experts,
            overwrite=overwrite,
            report=report,
            notice=notice,
        )
    print(
        f"wrote {out}: {', '.join(made['containers'])}, {made['bits_per_weight']:.3f} bits per weight, "
        f"{made['bytes'] / 1e6:,.1f} MB at {made['bytes'] / made['seconds'] / 1e6:,.0f} MB/s"
    )


def _explain(directory: Path, wanted: Plan | None, zero_point: str, *, requantise: bool) -> None:
    """Print how every format would store every width."""
    if requantise:
        raise InputError("--explain prints what is exact, --requantise is not; drop one of them")
    checkpoint = open_checkpoint(directory)
    resolved = checkpoint.widths(wanted) if wanted is not None else None
    table = explaining.explain(checkpoint, plan=resolved, zero_point=zero_point)
    Console().print(explaining.render(table, checkpoint))
