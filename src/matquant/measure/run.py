"""Evaluate a checkpoint on text and tasks at several widths, with tables, a record and a picture as results."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from matquant.core.spec import Plan
from matquant.format.read import Checkpoint, manifest_sha256, open_checkpoint
from matquant.format.sizes import bits_per_weight
from matquant.measure import kept
from matquant.measure.metrics import METRICS
from matquant.measure.request import Request, check_evaluation
from matquant.measure.tasks import (
    check_tasks,
    find_harness,
    fingerprint,
    known_results,
    open_tasks,
    summarise,
    task_average,
)
from matquant.measure.windows import Windows, cut
from matquant.report.tables import task_table, width_table, write_json
from matquant.system import ranks
from matquant.system.errors import InputError
from matquant.system.lazy import lazy
from matquant.system.locks import holding
from matquant.system.progress import Count

if TYPE_CHECKING:
    from matquant.distributed import collect, group
    from matquant.measure import with_engine, with_torch
    from matquant.report import plots
else:
    collect, group = lazy("matquant.distributed.collect"), lazy("matquant.distributed.group")
    plots = lazy("matquant.report.plots")
    with_engine, with_torch = lazy("matquant.measure.with_engine"), lazy("matquant.measure.with_torch")

Show = Callable[[RenderableType], None]


@holding("json_file")
def evaluate_checkpoint(
    directory: Path,
    *,
    bits: Sequence[int],
    device: str | None = None,
    json_file: Path | None = None,
    plot_file: Path | None = None,
    show: Show = lambda table: None,
    progress: Callable[[str], None] = lambda line: None,
    report: Count = lambda stage, done, total: None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a checkpoint at ``bits``, at a plan and beside its float model; return and write the record.

    options: fields of ``request.Request``. device None: cuda if there is one. The record is {"checkpoint": sha256 of
    its manifest, "engine": "torch" or "native", "log_perplexity": {width: nats per token}, "bits_per_weight": {width:
    bits}, "reference": nats or None, "tokens": predicted tokens, "context": sequence length}, with a plan also "plan":
    {"name": file name, "bits": {path: bits}}, with these metrics also "kld": {width: nats per token} and "top1":
    {width: fraction of 1}, with tasks also "tasks": {width: {task: {"metric": the one in Task Avg., "metrics": {name:
    fraction of 1}, "questions": count, "fingerprint": sha256}}} and "task_average": {width: fraction of 1}.

    The record is written after every task, and results in ``json_file`` with the same fingerprint are reused: a killed
    run continues. progress: called with every task in words. report: called with the current width or task, the amount
    done and the total. InputError naming the width and the layer where NaN or infinity begins.
    """
    with group.joined(device) if ranks.count() > 1 else contextlib.nullcontext():
        return _evaluate(
            directory,
            bits=bits,
            device=device,
            json_file=json_file,
            plot_file=plot_file,
            show=show if ranks.leads() else lambda table: None,
            progress=progress,
            report=report,
            **options,
        )


def _evaluate(
    directory: Path,
    *,
    bits: Sequence[int],
    device: str | None,
    json_file: Path | None,
    plot_file: Path | None,
    show: Show,
    progress: Callable[[str], None],
    report: Count,
    **options: Any,
) -> dict[str, Any]:
    request = Request(**options)
    documents = check_evaluation(directory, json_file=json_file, needs_picture=plot_file is not None, **options)
    if plot_file is not None:
        plots.check_picture(plot_file)
    data = check_tasks(request.tasks, request.tasks_data) if request.tasks is not None else {}
    if request.tasks is not None:
        find_harness(request.engine)  # raises before any work if it is not installed
    backend = _backend(request, device)
    checkpoint = open_checkpoint(directory)
    plans, record = _begin(checkpoint, bits, request)
    with contextlib.ExitStack() as scratch:
        compared = None
        if request.text:
            windows = _windows(backend, checkpoint, documents, request)
            opened = _reference(backend, checkpoint, windows, request, device=device, report=report)
            compared = scratch.enter_context(opened)
        report("loading the model", 0, 0)
        model = backend.open_model(directory, device=device)
        if compared is not None:
            record |= _measure_text(model, plans, windows, compared, request, report)
            show(_width_table(directory, record))
    if request.tasks is not None:
        scores = _score_tasks(
            model, checkpoint, plans, data, request, known=known_results(json_file), progress=progress, report=report
        )
        _collect_tasks(record, scores, json_file)
        show(task_table(f"{directory}, zero-shot, percent", record["tasks"], record["task_average"]))
    if plot_file is not None and ranks.leads():
        _plot(plot_file, record, directory.name)
    if json_file is not None and ranks.leads():
        write_json(json_file, record)
    return record


def _backend(request: Request, device: str | None) -> Any:
    """Return the module that evaluates with an engine, with its device checked."""
    backend = with_torch if request.engine == "torch" else with_engine
    backend.check_device(device)
    return backend


def _begin(checkpoint: Checkpoint, bits: Sequence[int], request: Request) -> tuple[dict[str, Plan], dict[str, Any]]:
    """Return the plan of every width, and the record before anything is measured."""
    plans = {str(width): Plan(default=width) for width in bits}
    record: dict[str, Any] = {"checkpoint": manifest_sha256(checkpoint.directory), "engine": request.engine}
    if request.plan_file is not None:
        plans["plan"] = Plan.read(request.plan_file)
        record["plan"] = {"name": request.plan_file.stem, "bits": checkpoint.widths(plans["plan"])}
    sizes = {name: bits_per_weight(checkpoint, checkpoint.widths(plan)) for name, plan in plans.items()}
    return plans, record | {
        "log_perplexity": {}, "bits_per_weight": sizes, "reference": None, "context": None, "tokens": 0
    }  # fmt: skip


def _windows(backend: Any, checkpoint: Checkpoint, documents: Sequence[str], request: Request) -> Windows:
    """Return the sequences to evaluate."""
    stream = backend.read_stream(checkpoint.directory, checkpoint, documents[request.skip_documents :])
    if request.max_tokens is not None:
        stream = stream[: request.max_tokens + 1]  # one more than are predicted
    return cut(stream, context=request.seq_len or backend.default_context(checkpoint), stride=request.stride)


@contextlib.contextmanager
def _reference(
    backend: Any, checkpoint: Checkpoint, windows: Windows, request: Request, *, device: str | None, report: Count
) -> Iterator[tuple[float | None, kept.Kept | None]]:
    """Yield the reference's log-perplexity, and its log-probabilities if a metric needs them; None without them."""
    source = request.reference

    def read(writer: kept.Writer | None = None) -> float:
        if source is None:
            raise InputError(f"--reference-logits {request.reference_logits}: no such file; give --reference too")
        return with_torch.read_reference(
            source, windows, checkpoint=checkpoint, device=device, writer=writer, report=report
        )

    if not request.compares:
        yield (None if source is None else read()), None
        return
    with contextlib.ExitStack() as made:
        scratch = _on_first(lambda: made.enter_context(tempfile.TemporaryDirectory()))
        file = request.reference_logits or Path(scratch) / "reference.safetensors"
        facts = kept.describe(windows, reference=None if source is None else kept.identity(source))
        size = {"tokens": windows.predicted, "vocab": backend.vocabulary_rows(checkpoint)}

        def keep() -> None:
            if not file.exists():
                with kept.writing(file, facts, **size) as writer:
                    read(writer=writer)

        _on_first(keep)  # one process writes the file, for all
        found = kept.open_kept(file, facts, **size)
        yield found.log_perplexity, found
        _on_first(lambda: None)  # it is still being read


def _on_first(function: Callable[[], Any]) -> Any:
    """Return what ``function`` returns; of several processes only the first one calls it, for all."""
    return function() if ranks.count() == 1 else collect.on_first(function)


def _measure_text(
    model: Any,
    plans: Mapping[str, Plan],
    windows: Windows,
    compared: tuple[float | None, kept.Kept | None],
    request: Request,
    report: Count,
) -> dict[str, Any]:
    """Return the record's entries measured on text."""
    reference, truth = compared
    results = dict(model.measure(plans, windows, kept=truth, report=report))
    found: dict[str, Any] = {"context": windows.context, "tokens": windows.predicted, "reference": reference}
    for metric in ("ppl", *(name for name in METRICS if name != "ppl" and name in request.metrics)):
        key = "log_perplexity" if metric == "ppl" else metric
        found[key] = {name: values[metric] for name, values in results.items()}
    return found


def _width_table(directory: Path, record: Mapping[str, Any]) -> RenderableType:
    reference = {} if record["reference"] is None else {"float": record["reference"]}
    return width_table(
        f"{directory}, {record['tokens']:,} tokens, sequences of {record['context']}",
        {**reference, **record["log_perplexity"]},
        record["bits_per_weight"],
        compared={name: record[name] for name in METRICS if name in record},
    )


def _collect_tasks(
    record: dict[str, Any], scores: Iterator[tuple[str, str, dict[str, Any]]], json_file: Path | None
) -> None:
    """Add every task's result to the record as it comes, and write the record to ``json_file`` after each."""
    record["tasks"] = {}
    for name, task, result in scores:
        record["tasks"].setdefault(name, {})[task] = result
        if json_file is not None:
            write_json(json_file, record)
    record["task_average"] = {name: task_average(found) for name, found in record["tasks"].items()}


def _score_tasks(
    model: Any,
    checkpoint: Checkpoint,
    plans: Mapping[str, Plan],
    data: Mapping[str, str],
    request: Request,
    *,
    known: Mapping[str, Any],
    progress: Callable[[str], None],
    report: Count,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (width, task, result) of every task at every width, one width after the other on one model.

    data: task -> sha256 of its file. known: fingerprint -> result to reuse.
    """
    harness = find_harness(request.engine)
    limit, sha256 = request.limit, manifest_sha256(checkpoint.directory)
    facts = {"checkpoint": sha256, "limit": limit, "batch_size": request.batch_size, "lm_eval": harness.VERSION}
    if request.engine != "torch":
        facts["engine"] = request.engine
    widths = {name: checkpoint.widths(plan) for name, plan in plans.items()}
    keys = {
        (name, task): fingerprint(bits=bits_by_path, task=task, data=content, **facts)
        for name, bits_by_path in widths.items()
        for task, content in data.items()
    }
    needed = [task for task in data if any(keys[name, task] not in known for name in widths)]
    with open_tasks(harness, needed, request.tasks_data) as opened:
        served = model.wrap(harness, batch_size=request.batch_size)
        for number, ((name, task), key) in enumerate(keys.items(), 1):
            place = f"{number} of {len(keys)}: {task} at {f'int{name}' if name.isdigit() else name}"
            report(place, number - 1, len(keys))
            served.report = functools.partial(report, place)
            if key in known:
                progress(f"{place}, reused from the record")
                yield name, task, known[key]
            else:
                progress(place)
                model.set_bits(plan=widths[name])
                with model.checked():
                    results = harness.score(served, opened[task], limit=limit)
                yield name, task, summarise(task, results, key=key)


def _plot(file: Path, record: Mapping[str, Any], title: str) -> None:
    sizes, results = record["bits_per_weight"], record["log_perplexity"]
    names = [name for name in sizes if name != "plan"]
    curves = {title: ([sizes[name] for name in names], [results[name] for name in names])}
    if "plan" in sizes:
        curves["plan"] = ([sizes["plan"]], [results["plan"]])
    plots.plot_widths(file, curves, reference=record["reference"])
