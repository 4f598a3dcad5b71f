"""``matquant eval``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from matquant.cli.arguments import Device, Directory, Option, Text, widths
from matquant.measure.request import check_evaluation
from matquant.system import progress, ranks
from matquant.system.files import json_text
from matquant.system.lazy import lazy

if TYPE_CHECKING:
    from matquant.measure import run
else:
    run = lazy("matquant.measure.run")


def evaluate(
    directory: Directory,
    bits: Annotated[str, Option(help="Widths to evaluate.")] = "8,6,4,3,2",
    text: Text = None,
    plan: Annotated[Path | None, Option(metavar="FILE", help="Also evaluate this mixed-precision plan.")] = None,
    reference: Annotated[str | None, Option(metavar="MODEL", help="Also evaluate this float reference.")] = None,
    reference_logits: Annotated[
        Path | None,
        Option(metavar="FILE", help="Keep the reference's log-probabilities here and reuse them."),
    ] = None,
    metrics: Annotated[
        str, Option(metavar="NAMES", help="ppl; against the reference kld (KL divergence), top1 (same top token).")
    ] = "ppl",
    engine: Annotated[
        str, Option(help="torch (exact, CPU or GPU) or native (the CPU engine; int8 activations).")
    ] = "torch",
    seq_len: Annotated[
        int | None, Option(help="Sequence length in tokens.", show_default="the model's context")
    ] = None,
    stride: Annotated[
        int | None, Option(help="Stride in tokens between the starts of two sequences.", show_default="no overlap")
    ] = None,
    max_tokens: Annotated[int | None, Option(help="Evaluate at most this many tokens.")] = None,
    skip_documents: Annotated[int, Option(help="Skip this many documents at the start of the text.")] = 0,
    tasks: Annotated[str | None, Option(metavar="NAMES", help="Zero-shot tasks, such as arc_easy,boolq.")] = None,
    tasks_data: Annotated[
        Path | None,
        Option(metavar="DIR", help="Directory of the tasks' data, arc_easy.jsonl etc.", show_default="the hub"),
    ] = None,
    limit: Annotated[int | None, Option(help="Evaluate at most this many questions per task.")] = None,
    batch_size: Annotated[int, Option(help="Answers per forward pass.")] = 8,
    device: Device = None,
    json_file: Annotated[
        Path | None,
        Option("--json", metavar="FILE", help="Also write the record here; its finished tasks are reused."),
    ] = None,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Draw log-perplexity against bits per weight.")] = None,
) -> None:
    """Measure log-perplexity and zero-shot accuracy at every width; the last line is JSON."""
    options: dict[str, Any] = {
        "text": text or [], "plan_file": plan, "reference": reference, "reference_logits": reference_logits,
        "metrics": _names(metrics), "engine": engine, "seq_len": seq_len, "stride": stride, "max_tokens": max_tokens,
        "skip_documents": skip_documents, "tasks": None if tasks is None else _names(tasks), "tasks_data": tasks_data,
        "limit": limit, "batch_size": batch_size, "json_file": json_file,
    }  # fmt: skip
    measured = widths(bits)
    check_evaluation(directory, needs_picture=plot is not None, **options)  # before torch is imported
    with progress.counted("eval") as count:
        record = run.evaluate_checkpoint(
            directory, bits=measured, device=device, plot_file=plot, **options, show=Console().print, report=count
        )
    if ranks.leads():
        print(json_text(record))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
