"""The paper's six zero-shot tasks at every width of one resident model, through lm-evaluation-harness.

Prompts, answers and metrics come from the harness's task files; data come from the hub, or from local files (one JSON
object per line, with the field names of the hub's data sets) that replace the data in those task files. One model is
loaded, dense (``kernels="none"``), and switched in place, so results equal the harness on the dense slice exactly.
With ``--engine native`` the same harness asks the native engine, without torch: its int8 activations may change an
answer here and there.

Task Avg. is the mean of one metric per task. The paper (section 4) names the six tasks but not the metrics; we use the
harness's length-normalised accuracy if there is one, and plain accuracy for BoolQ and Winogrande. The record has both.

The fingerprint of a result covers everything it depends on: checkpoint, bits of every path, task, data, limit, batch
size, harness. A result with the same fingerprint in an earlier record is not computed again.
"""

import contextlib
import hashlib
import importlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matquant.system.arguments import check_names
from matquant.system.errors import InputError
from matquant.system.files import MARK, read_text


class Task(NamedTuple):
    """A task. metric: enters Task Avg. template: the harness's task file. split: the evaluated one.
    fields: of its data."""

    metric: str
    template: str
    split: str
    fields: tuple[str, ...]


TASKS = {
    "arc_challenge": Task("acc_norm", "arc/arc_challenge.yaml", "test", ("question", "choices", "answerKey")),
    "arc_easy": Task("acc_norm", "arc/arc_easy.yaml", "test", ("question", "choices", "answerKey")),
    "boolq": Task("acc", "super_glue/boolq/default.yaml", "validation", ("passage", "question", "label")),
    "hellaswag": Task(
        "acc_norm", "hellaswag/hellaswag.yaml", "validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    ),
    "piqa": Task("acc_norm", "piqa/piqa.yaml", "validation", ("goal", "sol1", "sol2", "label")),
    "winogrande": Task("acc", "winogrande/default.yaml", "validation", ("sentence", "option1", "option2", "answer")),
}
HUB = "hub"


def check_tasks(names: Sequence[str], data: Path | None) -> dict[str, str]:
    """Return task -> sha256 of its file in ``data``, or "hub". InputError for unknown tasks and unusable files."""
    check_names(names, TASKS, flag="--tasks", kind="task")
    if data is None:
        return dict.fromkeys(names, HUB)
    return {name: _check_file(data / f"{name}.jsonl", TASKS[name]) for name in names}


def _check_file(file: Path, task: Task) -> str:
    if not file.is_file():
        raise InputError(
            f"--tasks-data {file}: no such file; give a directory with a .jsonl file for every task, "
            "or drop --tasks-data to use the hub"
        )
    content = file.read_bytes()
    lines = content.removeprefix(MARK.encode()).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}, line {number} is not JSON ({error}); give one object per line") from None
        missing = [name for name in task.fields if not isinstance(fields, dict) or name not in fields]
        if missing:
            raise InputError(f"{file}, line {number} has no {missing[0]!r}; give objects with {', '.join(task.fields)}")
    if not lines:
        raise InputError(f"{file} is empty; give one object with {', '.join(task.fields)} per line")
    return hashlib.sha256(content).hexdigest()


def find_harness(engine: str = "torch") -> Any:
    """Return the module that runs lm-evaluation-harness on an engine; InputError if that is not installed."""
    try:
        return importlib.import_module(f"matquant.integrations.{'lm_eval' if engine == 'torch' else 'harness'}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("matquant"):
            raise
        raise InputError(
            f"--tasks needs {str(error.name).partition('.')[0]}, which is not installed; pip install 'matquant[eval]'"
        ) from None


@contextlib.contextmanager
def open_tasks(harness: Any, names: Sequence[str], data: Path | None) -> Iterator[dict[str, Any]]:
    """Yield name -> the harness's task with its data read. InputError if the hub cannot be reached."""
    with tempfile.TemporaryDirectory() as scratch:
        tasks = {}
        for name in names:
            if data is None:
                file = harness.TEMPLATES / TASKS[name].template
            else:
                file = Path(scratch) / f"{name}.yaml"
                lines = _without_mark(data / f"{name}.jsonl", Path(scratch))
                file.write_text(json.dumps(_local_task(name, lines, harness.TEMPLATES, scratch)))  # JSON is YAML
            try:
                tasks[name] = harness.load_task(file)
            except Exception as error:  # the hub's client, transport and cache raise many types
                if data is not None:
                    raise
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise InputError(
                    f"cannot download the data of {name} ({reason}); give --tasks-data DIR with {name}.jsonl"
                ) from None
        yield tasks


def _without_mark(file: Path, scratch: Path) -> Path:
    """Return ``file``, or a copy in ``scratch`` if it begins with a byte-order mark, which the harness cannot read."""
    content = file.read_bytes()
    if not content.startswith(MARK.encode()):
        return file
    copy = scratch / file.name
    copy.write_bytes(content.removeprefix(MARK.encode()))
    return copy


def _local_task(name: str, file: Path, templates: Path, cache: str) -> dict[str, Any]:
    """Return the harness's task with the data of a local file."""
    task = TASKS[name]
    splits = {f"{split}_split": task.split if split == task.split else None for split in ("validation", "test")}
    return {
        "include": str(templates / task.template),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {task.split: str(file.resolve())}, "cache_dir": cache},
        "training_split": None,
        **splits,
        "fewshot_split": task.split,
    }


def fingerprint(**facts: Any) -> str:
    """Return the sha256 of everything that a result depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def known_results(file: Path | None) -> dict[str, Any]:
    """Return fingerprint -> result of every task in an earlier record; empty if ``file`` is not a record."""
    try:
        record = json.loads(read_text(file)) if file is not None and file.is_file() else {}
        results = [result for width in record.get("tasks", {}).values() for result in width.values()]
        return {result["fingerprint"]: result for result in results}
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return {}


def summarise(name: str, results: Mapping[str, Any], *, key: str) -> dict[str, Any]:
    """Return the part of the harness's results for the record: metrics without filter names, and the fingerprint."""
    metrics = {metric.removesuffix(",none"): value for metric, value in results.items() if metric.endswith(",none")}
    return {"metric": TASKS[name].metric, "metrics": metrics, "questions": results["sample_len"], "fingerprint": key}


def task_average(results: Mapping[str, Mapping[str, Any]]) -> float:
    """Return Task Avg., the mean over tasks of each task's metric, a fraction of 1; over all six it is the paper's."""
    values = [float(result["metrics"][result["metric"]]) for result in results.values()]
    return sum(values) / len(values)
