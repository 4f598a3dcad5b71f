"""The folder ``.OUT.work`` that an interrupted run leaves beside OUT, with a record of that run.

``run.json`` holds everything that a run's numbers depend on: its settings, the hash of its text, and the state of the
source model's files. It is written before any work, so every later ``--resume`` is compared with it. A folder without
it comes from an earlier version. ``distill`` keeps its record in a folder per run (distill.py). Only the run that holds
OUT (locks.py) writes here.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matquant.system.errors import InputError
from matquant.system.files import json_bytes, sha256, write_atomically
from matquant.system.locks import delete, hold

RECORD = "run.json"
FORMAT = 1
HASHED_BYTES = 2**28  # files up to this size are hashed whole, which takes a fraction of a second
HEADER_BYTES = 2**20  # of larger files only the start is hashed, which holds safetensors' header
READ_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")  # files that loading a model reads
FIRST = ("method", "model")  # settings that are compared first
AGAIN = "or use --overwrite to start again"
CHANGED = {  # setting that is a hash -> the message if it differs
    "data_sha256": "--resume needs the text of the interrupted run, found other text; use the same text",
    "start": "--resume needs the --start checkpoint of the interrupted run, found another; use the same one",
}


def work_folder(target: Path) -> Path:
    """Return the folder in which a run that writes ``target`` keeps its finished work."""
    return target.with_name(f".{target.name}.work")


def check_work(target: Path, *, method: str, resume: bool, overwrite: bool) -> None:
    """Raise InputError unless a run that writes ``target`` may start, or may continue an interrupted one.

    It may not if another run is at work, if an interrupted run is neither continued nor overwritten, or if that run
    used another method.
    """
    work = work_folder(target)
    with hold(target, again=True):
        if resume and not work.is_dir():
            raise InputError(f"--resume found no interrupted run in {work}; drop --resume to start one")
        if work.is_dir() and not resume and not overwrite:
            raise InputError(
                f"{work} holds an interrupted run; use --resume to continue it, or --overwrite to start again"
            )
        for record in _records(work) if resume else ():
            theirs = str(record.get("method")).rpartition(", ")[2]  # the last of its methods so far
            check_same_run({"method": theirs}, {"method": method})


def claim(work: Path, mark: Mapping[str, Any], *, resume: bool) -> None:
    """Start the work of a run, after all checks of its input; without ``resume`` old work is deleted.

    mark: everything the run depends on, as JSON values. If ``resume`` finds another run's record, InputError is raised
    and nothing changes.
    """
    if resume and work.is_dir():
        for record in _records(work):
            check_same_run(record, mark)
        for unfinished in list(work.rglob("*.partial")):  # left by a killed run, since we hold OUT
            delete(unfinished)
    else:
        shutil.rmtree(work, ignore_errors=True)
    if not (work / RECORD).is_file():
        write_atomically(work / RECORD, json_bytes({"format": FORMAT, "run": mark}))


def check_same_run(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise InputError naming the first setting in which an interrupted run differs from the one that resumes it."""
    for key in sorted(set(ours) | set(theirs), key=lambda key: (key not in FIRST, key)):
        if ours.get(key) == theirs.get(key):
            continue
        if key in CHANGED:
            raise InputError(f"{CHANGED[key]}, {AGAIN}")
        if key == "files":
            raise InputError(_changed_file(theirs.get(key) or {}, ours.get(key) or {}, str(ours.get("model"))))
        raise InputError(
            f"--resume needs {key}={theirs.get(key)!r} as in the interrupted run, found {ours.get(key)!r}; "
            f"use the same settings, {AGAIN}"
        )


def describe_files(directory: Path) -> dict[str, str]:
    """Return name -> a description that changes with the file, for all files of a model directory that are read.

    The description is the hash of the content; for files above HASHED_BYTES, the size, the time and the hash of the
    start.
    """
    files = sorted(file for file in directory.iterdir() if file.suffix in READ_SUFFIXES and file.is_file())
    return {file.name: _describe(file) for file in files}


def _describe(file: Path) -> str:
    facts = file.stat()
    if facts.st_size <= HASHED_BYTES:
        return sha256(file)
    return f"{facts.st_size} bytes of {facts.st_mtime_ns} ns, {sha256(file, first_bytes=HEADER_BYTES)}"


def _changed_file(theirs: Mapping[str, str], ours: Mapping[str, str], model: str) -> str:
    name = next(name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name))
    how = "is new" if name not in theirs else "is missing" if name not in ours else "has changed"
    return f"{Path(model) / name} {how} since the interrupted run began; restore the model, {AGAIN}"


def _records(work: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of the runs in a work folder; InputError if a record is damaged or missing."""
    files = [work / RECORD] if (work / RECORD).is_file() else sorted(work.glob(f"*/{RECORD}"))
    if not files and any(not file.name.endswith(".partial") for file in work.iterdir()):
        raise InputError(
            f"{work} was left by an earlier version of matquant and cannot be continued; "
            "finish it with that version, or use --overwrite to start again"
        )
    for file in files:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            known = record["format"] == FORMAT and isinstance(record["run"], dict)
        except (ValueError, KeyError, TypeError, RecursionError):
            known = False
        if not known:
            raise InputError(f"{file} is damaged; use --overwrite to start again")
        yield record["run"]
