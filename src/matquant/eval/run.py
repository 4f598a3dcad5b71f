"""The evaluation a user asks for: a checkpoint, some text, widths; out come a table, a JSON record and a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from matquant.checkpoint import bits_per_weight, open_checkpoint
from matquant.errors import InputError, check_positive
from matquant.eval.likelihood import context_length, evaluate, log_perplexity, predicted_tokens
from matquant.eval.report import check_picture, plot_widths, width_table, write_json
from matquant.integrations.transformers import load
from matquant.models import check_context, check_model_path, load_float, load_tokenizer
from matquant.spec import Plan
from matquant.text import read_documents, token_stream


def evaluate_checkpoint(
    directory: Path,
    *,
    bits: Sequence[int],
    text: Sequence[Path],
    plan_file: Path | None = None,
    reference: Path | str | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    skip_documents: int = 0,
    json_file: Path | None = None,
    plot_file: Path | None = None,
    show: Callable[[RenderableType], None] = lambda table: None,
) -> dict[str, Any]:
    """Evaluate a checkpoint at ``bits``, at a plan and beside its float model; returns and writes the record.

    The record is {"log_perplexity": {width: nats per token}, "bits_per_weight": {width: bits}, "reference": nats or
    None, "tokens": predicted tokens, "context": window}. max_tokens: evaluate on the first so many tokens.
    """
    counts = {"seq_len": seq_len, "stride": stride, "max_tokens": max_tokens}
    check_positive(**{name: value for name, value in counts.items() if value is not None})
    if plot_file is not None:
        check_picture(plot_file)
    if json_file is not None and json_file.is_dir():
        raise InputError(f"--json {json_file} is a directory; give a file")
    if reference is not None:
        check_model_path(reference)
    checkpoint = open_checkpoint(directory)
    plan = Plan.read(plan_file) if plan_file is not None else None
    resolved = plan.resolve(checkpoint.shapes) if plan is not None else {}
    documents = read_documents(text)
    if not 0 <= skip_documents < len(documents):
        raise InputError(f"skip_documents={skip_documents} of {len(documents)} documents; leave at least one")
    stream = token_stream(documents[skip_documents:], load_tokenizer(directory))
    if max_tokens is not None:
        stream = stream[: max_tokens + 1]
    model = load(directory, check_hashes=False, kernels="none")  # open_checkpoint has just checked them
    context = seq_len or context_length(model)
    check_context(model, context)
    results = evaluate(model, stream, bits=bits, plan=plan, context=context, stride=stride)
    sizes = {str(width): bits_per_weight(checkpoint, dict.fromkeys(checkpoint.shapes, width)) for width in bits}
    if plan is not None:
        sizes["plan"] = bits_per_weight(checkpoint, resolved)
    record: dict[str, Any] = {
        "log_perplexity": results,
        "bits_per_weight": sizes,
        "reference": None,
        "context": context,
        "tokens": predicted_tokens(stream, context=context, stride=stride),
    }
    shown = dict(results)
    if reference is not None:
        dtype = next(model.parameters()).dtype
        record["reference"] = log_perplexity(load_float(reference, dtype=dtype), stream, context=context, stride=stride)
        shown = {"float": record["reference"], **results}
    show(width_table(f"{directory}, {record['tokens']:,} tokens, windows of {context}", shown, sizes))
    if plot_file is not None:
        names = [str(width) for width in bits]
        curve = ([sizes[name] for name in names], [results[name] for name in names])
        curves = {directory.name: curve}
        if plan is not None:
            curves["plan"] = ([sizes["plan"]], [results["plan"]])
        plot_widths(plot_file, curves, reference=record["reference"])
    if json_file is not None:
        write_json(json_file, record)
    return record
