"""Turn panics of the tokenizers library into one-line errors.

Rust code panics on an impossible state: Python gets a PanicException, which is not an Exception, after the panic's
report went to file descriptor 2. ``one_line`` turns both into an InputError. One kind of damage ends the process
instead (the panic's message cuts a character in two); ``check_merges`` detects it first.
"""

import contextlib
import functools
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from matquant.system.errors import InputError

PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')


@contextlib.contextmanager
def one_line(fault: str, advice: str) -> Iterator[None]:
    """Raise InputError "fault (tokenizers' message); advice" for any failure in tokenizers."""
    with _without_report():
        try:
            yield
        except (InputError, MemoryError):
            raise
        except BaseException as error:  # tokenizers raises plain Exceptions
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            first = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(": ")
            raise InputError(f"{fault} ({first}); {advice}") from None


def check_merges(file: Path) -> None:
    """Raise InputError if the second part of a merge in tokenizer.json lacks the required prefix."""
    data = file.read_bytes() if file.is_file() else b""
    if not PREFIX.search(data):
        return  # the usual case, which avoids parsing twice
    try:
        model = json.loads(data)["model"]
        if model["type"] != "BPE":
            return
        prefix = model["continuing_subword_prefix"]
        seconds = (merge.split(" ")[-1] if isinstance(merge, str) else merge[-1] for merge in model["merges"])
        wrong = next((text for text in seconds if not text.startswith(prefix)), None)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return  # tokenizers will report what is wrong
    if wrong is not None:
        raise InputError(
            f"{file} merges {wrong!r}, which lacks the prefix {prefix!r} of continued words; copy it again"
        )


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Hold back output on file descriptor 2; pass it on afterwards unless an InputError replaces it.

    Only in a process with one Python thread, such as the command line: other threads may be writing there.
    """
    saved = None
    with contextlib.suppress(OSError):  # no file descriptor 2, or no room for a file
        if threading.active_count() == 1 and sys.stderr is not None:
            held = _held(os.getpid())
            saved = None if os.path.sameopenfile(held, 2) else os.dup(2)  # None: a caller holds it back already
    if saved is None:
        yield
        return
    os.dup2(held, 2)
    try:
        yield
    except InputError:
        os.ftruncate(held, 0)
        raise
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        if size := os.lseek(held, 0, os.SEEK_CUR):
            os.lseek(held, 0, os.SEEK_SET)
            os.write(2, os.read(held, size))
            os.ftruncate(held, 0)
            os.lseek(held, 0, os.SEEK_SET)


@functools.cache
def _held(process: int) -> int:
    """Return the descriptor of an empty file of a process. It stays open: a new one for each token takes too long."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
