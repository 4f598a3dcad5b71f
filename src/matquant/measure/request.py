"""What an evaluation can reject before torch is imported: the command line asks first, ``evaluate_checkpoint`` too."""

from collections.abc import Sequence
from pathlib import Path

from matquant.core.spec import Plan
from matquant.format.checkpoint import open_checkpoint
from matquant.hf.source import check_source
from matquant.hf.text import read_documents
from matquant.measure.tasks import check_tasks
from matquant.system.errors import InputError, check_positive


def check_evaluation(
    directory: Path,
    *,
    text: Sequence[Path] = (),
    plan_file: Path | None = None,
    reference: Path | str | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    skip_documents: int = 0,
    tasks: Sequence[str] | None = None,
    tasks_data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    json_file: Path | None = None,
    needs_picture: bool = False,
) -> list[str]:
    """The documents of ``text``; InputError for a request that cannot be met. Hashes are left to the evaluation."""
    counts = {"seq_len": seq_len, "stride": stride, "max_tokens": max_tokens, "limit": limit, "batch_size": batch_size}
    check_positive(**{name: value for name, value in counts.items() if value is not None})
    if not text and tasks is None:
        raise InputError("eval needs text or tasks; give --text FILE or --tasks arc_easy,boolq")
    if tasks is None and (tasks_data is not None or limit is not None):
        raise InputError(
            "--tasks-data and --limit are of zero-shot tasks, none was asked for; give --tasks arc_easy,boolq"
        )
    if not text and (reference is not None or needs_picture):
        raise InputError("--reference and --plot need log-perplexity; give --text FILE too")
    if json_file is not None and json_file.is_dir():
        raise InputError(f"--json {json_file} is a directory; give a file")
    if tasks is not None:
        check_tasks(tasks, tasks_data)
    checkpoint = open_checkpoint(directory, check_hashes=False, check_sizes=True)
    if reference is not None:
        check_source(reference)
    if plan_file is not None:
        Plan.read(plan_file).resolve(checkpoint.shapes)
    documents = read_documents(text)
    if text and not 0 <= skip_documents < len(documents):
        raise InputError(f"skip_documents={skip_documents} of {len(documents)} documents; leave at least one")
    return documents
