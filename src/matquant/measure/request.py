"""The options of an evaluation, and every check that does not need torch.

The command line calls ``check_evaluation`` first, so that a mistyped path fails at once; ``evaluate_checkpoint`` calls
it again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matquant.core.spec import Plan
from matquant.format.read import open_checkpoint
from matquant.hf.source import check_source
from matquant.hf.text import read_documents
from matquant.measure.metrics import check_metrics
from matquant.measure.tasks import check_tasks
from matquant.system import ranks
from matquant.system.errors import InputError, check_positive

ENGINES = ("torch", "native")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of an evaluation, besides the widths."""

    text: Sequence[Path] = ()  # held-out text; empty: only tasks
    plan_file: Path | None = None  # also measure this plan
    reference: Path | str | None = None  # also measure this float model: a directory, a GGUF file or a hub id
    reference_logits: Path | None = None  # file that keeps the reference's log-probabilities; None: a temporary one
    metrics: Sequence[str] = ("ppl",)  # names of measure.metrics.METRICS; log-perplexity is always measured
    engine: str = "torch"  # torch or native
    seq_len: int | None = None  # sequence length in tokens; None: the model's context
    stride: int | None = None  # tokens between the starts of two sequences; None: no overlap
    max_tokens: int | None = None  # evaluate at most this many tokens of the text
    skip_documents: int = 0  # documents to skip at the start of the text
    tasks: Sequence[str] | None = None  # zero-shot tasks, names of measure.tasks.TASKS
    tasks_data: Path | None = None  # directory of their data; None: the hub
    limit: int | None = None  # evaluate at most this many questions per task
    batch_size: int = 8  # answers of a task per forward pass

    @property
    def compares(self) -> bool:
        """Return whether a metric compares with the reference."""
        return any(name != "ppl" for name in self.metrics)


def check_evaluation(
    directory: Path, *, json_file: Path | None = None, needs_picture: bool = False, **options: Any
) -> list[str]:
    """Return the documents of the text; InputError for a request that cannot be served.

    options: fields of Request. The evaluation itself checks the checkpoint's hashes.
    """
    request = Request(**options)
    text, tasks, limit = request.text, request.tasks, request.limit
    if tasks is not None:
        ranks.check_single("eval --tasks")
    if request.engine == "native":
        ranks.check_single("eval --engine native")
    counts = {name: getattr(request, name) for name in ("seq_len", "stride", "max_tokens", "limit", "batch_size")}
    check_positive(**{name: value for name, value in counts.items() if value is not None})
    if not text and tasks is None:
        raise InputError("eval needs text or tasks; give --text FILE or --tasks arc_easy,boolq")
    if tasks is None and (request.tasks_data is not None or limit is not None):
        raise InputError("--tasks-data and --limit need --tasks; give --tasks arc_easy,boolq")
    if not text and (request.reference is not None or needs_picture or request.compares):
        raise InputError("--reference, --metrics and --plot need log-perplexity; give --text FILE")
    _check_engine(request)
    kept = request.reference_logits
    if kept is not None and kept.is_dir():
        raise InputError(f"--reference-logits {kept} is a directory; give a file")
    check_metrics(request.metrics, has_reference=request.reference is not None or (kept is not None and kept.exists()))
    if kept is not None and not request.compares:
        raise InputError("--reference-logits needs a metric that compares; give --metrics ppl,kld,top1")
    if json_file is not None and json_file.is_dir():
        raise InputError(f"--json {json_file} is a directory; give a file")
    if tasks is not None:
        check_tasks(tasks, request.tasks_data)
    checkpoint = open_checkpoint(directory, check_hashes=False, check_sizes=True)
    if request.reference is not None:
        check_source(request.reference)
    if request.plan_file is not None:
        checkpoint.widths(Plan.read(request.plan_file))
    documents = read_documents(text)
    if text and not 0 <= request.skip_documents < len(documents):
        raise InputError(
            f"skip_documents={request.skip_documents} skips all {len(documents)} documents; leave at least one"
        )
    return documents


def _check_engine(request: Request) -> None:
    """Raise InputError for an unknown engine."""
    if request.engine not in ENGINES:
        raise InputError(f"--engine {request.engine!r} is not known; use {' or '.join(ENGINES)}")
