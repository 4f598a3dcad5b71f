"""What an interrupted run leaves: the folder ``.OUT.work`` beside OUT, and in it the record of the run it belongs to.

``run.json`` holds everything the numbers of a run depend on: its settings, the hash of its text, and what the files of
its source model were. It is written before any work, so every later ``--resume`` is compared with it, however far the
run got. A folder without it was left by an earlier version. ``distill`` has its record in a folder for each run
(distill.py). Whoever writes here holds OUT (locks.py).
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
HEADER_BYTES = 2**20  # of larger ones the beginning, where safetensors says what is in a file
READ_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")  # what loading a model reads
FIRST = ("method", "model")  # in which settings to look for a difference first
AGAIN = "or --overwrite to start again"
CHANGED = {  # settings that are hashes: what differs, in words
    "data_sha256": "--resume with other text than the interrupted run had; use the same text",
    "start": "--resume with another --start checkpoint than the interrupted run had; use the same one",
}


def work_folder(target: Path) -> Path:
    """Where a run that writes ``target`` keeps what it has finished."""
    return target.with_name(f".{target.name}.work")


def check_work(target: Path, *, method: str, resume: bool, overwrite: bool) -> None:
    """InputError unless a run that writes ``target`` may begin, or may go on with what an interrupted one left.

    Another run at work, an interrupted one that is neither continued nor given up, one of another method.
    """
    work = work_folder(target)
    with hold(target, again=True):
        if resume and not work.is_dir():
            raise InputError(f"--resume found no interrupted run in {work}; leave --resume out to start one")
        if work.is_dir() and not resume and not overwrite:
            raise InputError(f"{work} holds an interrupted run; --resume to continue it, or --overwrite to start again")
        for record in _records(work) if resume else ():
            theirs = str(record.get("method")).rpartition(", ")[2]  # the last of those it has been through
            check_same_run({"method": theirs}, {"method": method})


def claim(work: Path, mark: Mapping[str, Any], *, resume: bool) -> None:
    """Begin the work of a run, after all checks of its input; without ``resume`` what was there is deleted.

    mark: everything the run depends on, as JSON has it. InputError, and nothing changed, if ``resume`` finds another
    run's record.
    """
    if resume and work.is_dir():
        for record in _records(work):
            check_same_run(record, mark)
        for unfinished in list(work.rglob("*.partial")):  # a killed run's, as OUT is held
            delete(unfinished)
    else:
        shutil.rmtree(work, ignore_errors=True)
    if not (work / RECORD).is_file():
        write_atomically(work / RECORD, json_bytes({"format": FORMAT, "run": mark}))


def check_same_run(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """InputError naming the first setting in which an interrupted run differs from the one that would continue it."""
    for key in sorted(set(ours) | set(theirs), key=lambda key: (key not in FIRST, key)):
        if ours.get(key) == theirs.get(key):
            continue
        if key in CHANGED:
            raise InputError(f"{CHANGED[key]}, {AGAIN}")
        if key == "files":
            raise InputError(_changed_file(theirs.get(key) or {}, ours.get(key) or {}, str(ours.get("model"))))
        raise InputError(
            f"--resume with {key}={ours.get(key)!r}, the interrupted run had {theirs.get(key)!r}; "
            f"use the same settings, {AGAIN}"
        )


def describe_files(directory: Path) -> dict[str, str]:
    """Name -> what tells a changed file from an unchanged one, for all files of a model directory that are read.

    The hash of its content, or of a file above HASHED_BYTES its size, its time and the hash of its beginning.
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
    """The records of the runs in a work folder; InputError if one is damaged, or there is none beside some work."""
    files = [work / RECORD] if (work / RECORD).is_file() else sorted(work.glob(f"*/{RECORD}"))
    if not files and any(not file.name.endswith(".partial") for file in work.iterdir()):
        raise InputError(
            f"{work} was left by an earlier version of matquant and cannot be continued; "
            "finish it with that version, or --overwrite to start again"
        )
    for file in files:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            known = record["format"] == FORMAT and isinstance(record["run"], dict)
        except (ValueError, KeyError, TypeError, RecursionError):
            known = False
        if not known:
            raise InputError(f"{file} is damaged; --overwrite to start again")
        yield record["run"]
