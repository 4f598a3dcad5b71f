"""Files: written so that a crash or a full disk never leaves half of one, hashed, and read when users name them."""

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from matquant.system.errors import InputError
from matquant.system.locks import hold, partial_path, remove_leftovers

NO_REPLACE, EXCHANGE = 1, 2  # flags of renameat2
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL)  # by the system, by the file system

MARK = "\ufeff"  # byte-order mark; in UTF-8 it says nothing


def sha256(file: Path, *, first_bytes: int | None = None) -> str:
    """Of what a file holds, or of its ``first_bytes``, in hexadecimal digits."""
    with file.open("rb") as stream:
        if first_bytes is not None:
            return hashlib.sha256(stream.read(first_bytes)).hexdigest()
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_text(value: Any, *, indent: int | None = None, sort_keys: bool = True) -> str:
    """``value`` as JSON, which knows no NaN and no infinity: InputError naming the key of one."""
    try:
        return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False)
    except ValueError:
        place, number = next(_not_finite(value, ""), ("", ""))
        if not place:
            raise
        raise InputError(
            f"{place.lstrip('.')} is {number}, which JSON cannot hold; it must be a finite number"
        ) from None


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """Where in a JSON value numbers are NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place or "the value", value
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in inner:
        yield from _not_finite(part, f"{place}.{key}")


def json_bytes(value: Any) -> bytes:
    """``value`` as the JSON we write into directories: sorted keys, two spaces, a final newline."""
    return (json_text(value, indent=2) + "\n").encode()


def read_text(file: Path) -> str:
    """The text of a UTF-8 file without the byte-order mark that some editors put first; or UnicodeDecodeError.

    Every text and JSON file that a user may have edited is read by this.
    """
    return file.read_text(encoding="utf-8").removeprefix(MARK)


def read_json(file: Path, flag: str, *, give: str, missing: str = "") -> Any:
    """What the JSON file given to ``flag`` holds; InputError that says what to give (missing: if there is no file).

    Python's reader takes NaN and infinity; a file with them is rejected by the name of their key.
    """
    if not file.is_file():
        raise InputError(f"{flag} {file}: no such file; give {missing or give}")
    try:
        values = json.loads(read_text(file))
        place, number = next(_not_finite(values, ""), ("", 0.0))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{flag} {file} is not JSON ({error}); give {give}") from None
    if place:
        raise InputError(f"{flag} {file} has {place.lstrip('.')} = {number}, not a finite number; measure it again")
    return values


def write_atomically(file: Path, content: bytes) -> None:
    """Write ``content`` beside ``file``, sync it, and rename it into place; an old file is replaced."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_when_done(file) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def replace_when_done(file: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a path to write to; afterwards it is synced and becomes ``file``. A failure leaves ``file`` as it was.

    Its permissions are those of any new file (the umask), whoever writes it. InputError if ``overwrite`` is false and
    there is such a file by then.
    """
    if file.exists() and not file.is_file():
        raise InputError(f"{file} is not a regular file and will not be replaced; give another path")
    remove_leftovers(file)
    partial = partial_path(file)
    try:
        with explain_full_disk(file):
            partial.touch(exist_ok=False)
            permissions = partial.stat().st_mode & 0o777
            yield partial
            _permit(partial, permissions)
            sync(partial)
        if overwrite:
            partial.replace(file)
        else:
            _rename_to_new(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def check_replaceable(target: Path, marker: str, what: str, *, overwrite: bool) -> None:
    """InputError if the directory ``target`` may not be written: it exists without ``overwrite``, or is not ``what``.

    A directory is ``what`` if it is empty or holds the file ``marker``.
    """
    if not target.exists():
        return
    if not overwrite:
        raise _exists(target)
    if not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file()):
        raise InputError(f"{target} is not {what} and will not be replaced; give another -o")


@contextlib.contextmanager
def replace_directory_when_done(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    """Yield a new directory to fill; afterwards all is synced and it becomes ``target``, locked meanwhile.

    check: raises InputError unless ``target`` may be written; called before the work and after it.
    A failure leaves ``target`` as it was, and nothing beside it. A full disk is an InputError. The files get the
    permissions of any new file (the umask), whoever writes them.
    """
    with hold(target, again=True):
        check()
        partial = partial_path(target)
        try:
            with explain_full_disk(target):
                partial.mkdir()
                yield partial
                permissions = partial.stat().st_mode & 0o666
                for file in partial.iterdir():
                    _permit(file, permissions)
                    sync(file)
                sync(partial)
            check()
            move_into_place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def move_into_place(partial: Path, target: Path) -> None:
    """Rename the directory ``partial`` to ``target``; an old one is there until the new one is."""
    if not target.exists():
        _rename_to_new(partial, target)
    elif not _exchange(partial, target):
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        try:
            target.rename(old)
            partial.rename(target)
        except BaseException:
            if not target.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync(target.absolute().parent)


def _rename_to_new(source: Path, target: Path) -> None:
    """Rename a file or directory; InputError if there is a ``target``, also one that appeared at this moment."""
    found = _renameat2(source, target, NO_REPLACE)
    if found == errno.EEXIST or (found in UNSUPPORTED and target.exists()):
        raise _exists(target)
    if found:  # not supported, or an error that rename explains
        source.rename(target)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one atomic step; False where the system cannot."""
    return _renameat2(first, second, EXCHANGE) == 0


def _renameat2(source: Path, target: Path, flag: int) -> int:
    """Linux's rename with a flag: 0, or the number of the error; ENOSYS on other systems."""
    with contextlib.suppress(AttributeError, OSError):
        library, here = ctypes.CDLL(None, ctypes.DEFAULT_MODE, None, True), -100  # keeps errno; AT_FDCWD
        failed = library.renameat2(here, os.fsencode(source), here, os.fsencode(target), flag)
        return ctypes.get_errno() if failed else 0
    return errno.ENOSYS


def _permit(file: Path, permissions: int) -> None:
    """Set the permissions of a file, where the file system has any."""
    if file.stat().st_mode & 0o777 != permissions:
        with contextlib.suppress(PermissionError):
            file.chmod(permissions)


def _exists(target: Path) -> InputError:
    return InputError(f"{target} exists; give another -o, or --overwrite to replace it")


def sync(path: Path) -> None:
    """Force a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_full_disk(target: Path) -> Iterator[None]:
    """Turn "no space left", from the system or from safetensors, into an InputError that says what would do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))  # how safetensors says it
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{target} was not written: no space left on the device ({free_bytes(target)} bytes free); "
            "free some space or give another place"
        ) from None


def check_space(target: Path, needed_bytes: int) -> None:
    """InputError if the disk of ``target`` has less than ``needed_bytes`` free."""
    free = free_bytes(target)
    if free < needed_bytes:
        raise InputError(
            f"{target} needs about {needed_bytes} bytes, its disk has {free} free; "
            "free some space or give another place"
        )


def free_bytes(target: Path) -> int:
    """Free bytes on the disk that ``target`` is, or would be, on."""
    existing = next(parent for parent in [target, *target.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free
