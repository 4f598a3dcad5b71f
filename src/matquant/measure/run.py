"""Evaluate a checkpoint on text and tasks at several widths, with tables, a record and a picture as results."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType

from matquant.core.spec import Plan
from matquant.format.read import Checkpoint, manifest_sha256, open_checkpoint
from matquant.format.sizes import bits_per_weight
from matquant.hf.text import token_stream
from matquant.hf_torch.config import check_context, context_length, vocabulary_size
from matquant.hf_torch.device import choose_device
from matquant.hf_torch.finite import checked_logits
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.hf_torch.nested_model import load
from matquant.measure.likelihood import evaluate, log_perplexity, predicted_tokens
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
from matquant.report.tables import check_picture, plot_widths, task_table, width_table, write_json
from matquant.system.locks import holding
from matquant.system.progress import Count

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
    its manifest, "log_perplexity": {width: nats per token}, "bits_per_weight": {width: bits}, "reference": nats or
    None, "tokens": predicted tokens, "context": sequence length}, with a plan also "plan": {"name": file name, "bits":
    {path: bits}}, with tasks also "tasks": {width: {task: {"metric": the one in Task Avg., "metrics": {name: fraction
    of 1}, "questions": count, "fingerprint": sha256}}} and "task_average": {width: fraction of 1}.

    The record is written after every task, and results in ``json_file`` with the same fingerprint are reused: a killed
    run continues. progress: called with every task in words. report: called with the current width or task, the amount
    done and the total. InputError naming the width and the layer where NaN or infinity begins.
    """
    request = Request(**options)
    documents = check_evaluation(directory, json_file=json_file, needs_picture=plot_file is not None, **options)
    if plot_file is not None:
        check_picture(plot_file)
    place = choose_device(device)
    data = check_tasks(request.tasks, request.tasks_data) if request.tasks is not None else {}
    if request.tasks is not None:
        find_harness()  # raises before any work if it is not installed
    checkpoint = open_checkpoint(directory)
    plans = {str(width): Plan(default=width) for width in bits}
    record: dict[str, Any] = {"checkpoint": manifest_sha256(directory)}
    if request.plan_file is not None:
        plans["plan"] = Plan.read(request.plan_file)
        record["plan"] = {"name": request.plan_file.stem, "bits": checkpoint.widths(plans["plan"])}
    widths = {name: checkpoint.widths(plan) for name, plan in plans.items()}
    sizes = {name: bits_per_weight(checkpoint, bits_by_path) for name, bits_by_path in widths.items()}
    record |= {"log_perplexity": {}, "bits_per_weight": sizes, "reference": None, "context": None, "tokens": 0}
    stream = _stream(directory, checkpoint, documents, request) if request.text else None
    report("loading the model", 0, 0)
    model = load(directory, device=place, check_hashes=False, kernels="none")  # open_checkpoint has just checked them
    if stream is not None:
        record |= _measure_text(model, stream, request, bits=bits, plan=plans.get("plan"), device=place, report=report)
        shown = {**({} if request.reference is None else {"float": record["reference"]}), **record["log_perplexity"]}
        show(width_table(f"{directory}, {record['tokens']:,} tokens, sequences of {record['context']}", shown, sizes))
    if request.tasks is not None:
        scores = _score_tasks(
            model, directory, widths, data, request, known=known_results(json_file),
            checkpoint_sha256=record["checkpoint"], progress=progress, report=report,
        )  # fmt: skip
        _collect_tasks(record, scores, json_file)
        show(task_table(f"{directory}, zero-shot, percent", record["tasks"], record["task_average"]))
    if plot_file is not None:
        _plot(plot_file, record, directory.name)
    if json_file is not None:
        write_json(json_file, record)
    return record


def _stream(directory: Path, checkpoint: Checkpoint, documents: list[str], request: Request) -> np.ndarray:
    """Return the tokens to evaluate, one more than are predicted."""
    vocab_size = vocabulary_size(checkpoint.config)
    tokenizer = load_tokenizer(directory)
    stream = token_stream(documents[request.skip_documents :], tokenizer, vocab_size=vocab_size)
    return stream if request.max_tokens is None else stream[: request.max_tokens + 1]


def _measure_text(
    model: Any,
    stream: np.ndarray,
    request: Request,
    *,
    bits: Sequence[int],
    plan: Plan | None,
    device: Any,
    report: Count,
) -> dict[str, Any]:
    """Return the record's entries measured on text: log-perplexity, context, tokens, and the float reference."""
    context, stride = request.seq_len or context_length(model), request.stride
    check_context(model, context)
    results = evaluate(model, stream, bits=bits, plan=plan, context=context, stride=stride, report=report)
    tokens = predicted_tokens(stream, context=context, stride=stride)
    found: dict[str, Any] = {"log_perplexity": results, "context": context, "tokens": tokens}
    if request.reference is not None:
        dtype = next(model.parameters()).dtype
        report("loading the float model", 0, 0)
        floating = load_float(request.reference, dtype=dtype).to(device)
        told = functools.partial(report, "the float model")
        found["reference"] = log_perplexity(floating, stream, context=context, stride=stride, report=told)
    return found


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
    directory: Path,
    widths: Mapping[str, Mapping[str, int]],
    data: Mapping[str, str],
    request: Request,
    *,
    known: Mapping[str, Any],
    checkpoint_sha256: str,
    progress: Callable[[str], None],
    report: Count,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (width, task, result) of every task at every width, one width after the other on one model.

    data: task -> sha256 of its file. known: fingerprint -> result to reuse.
    """
    harness = find_harness()
    limit, batch_size = request.limit, request.batch_size
    facts = {"checkpoint": checkpoint_sha256, "limit": limit, "batch_size": batch_size, "lm_eval": harness.VERSION}
    keys = {
        (name, task): fingerprint(bits=bits_by_path, task=task, data=sha256, **facts)
        for name, bits_by_path in widths.items()
        for task, sha256 in data.items()
    }
    needed = [task for task in data if any(keys[name, task] not in known for name in widths)]
    with open_tasks(harness, needed, request.tasks_data) as opened:
        served = harness.wrap(model, load_tokenizer(directory), batch_size=batch_size)
        for number, ((name, task), key) in enumerate(keys.items(), 1):
            place = f"{number} of {len(keys)}: {task} at {f'int{name}' if name.isdigit() else name}"
            report(place, number - 1, len(keys))
            if key in known:
                progress(f"{place}, reused from the record")
                yield name, task, known[key]
            else:
                progress(place)
                model.set_bits(plan=widths[name])
                with checked_logits(model):
                    results = harness.score(served, opened[task], limit=limit)
                yield name, task, summarise(task, results, key=key)


def _plot(file: Path, record: Mapping[str, Any], title: str) -> None:
    sizes, results = record["bits_per_weight"], record["log_perplexity"]
    names = [name for name in sizes if name != "plan"]
    curves = {title: ([sizes[name] for name in names], [results[name] for name in names])}
    if "plan" in sizes:
        curves["plan"] = ([sizes["plan"]], [results["plan"]])
    plot_widths(file, curves, reference=record["reference"])
