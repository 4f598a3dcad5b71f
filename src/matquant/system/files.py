"""Read, hash and write files, so that a crash or a full disk never leaves half a file."""

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from matquant.system.errors import InputError
from matquant.system.locks import hold, partial_path, remove_leftovers

NO_REPLACE, EXCHANGE = 1, 2  # flags of renameat2
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL)  # not supported by the system, or by the file system

MARK = "\ufeff"  # byte-order mark, which carries no information in UTF-8


def sha256(file: Path, *, first_bytes: int | None = None) -> str:
    """Return the sha256 of a file, or of its ``first_bytes``, as hexadecimal digits."""
    with file.open("rb") as stream:
        if first_bytes is not None:
            return hashlib.sha256(stream.read(first_bytes)).hexdigest()
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_text(value: Any, *, indent: int | None = None, sort_keys: bool = True) -> str:
    """Return ``value`` as JSON. JSON has no NaN and no infinity: InputError naming the key of one."""
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
    """Yield the place and value of every number in a JSON value that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place or "the value", value
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in inner:
        yield from _not_finite(part, f"{place}.{key}")


def json_bytes(value: Any) -> bytes:
    """Return ``value`` as the JSON we write into directories: sorted keys, two spaces, a final newline."""
    return (json_text(value, indent=2) + "\n").encode()


def read_text(file: Path) -> str:
    """Read a UTF-8 file without the byte-order mark that some editors put first; UnicodeDecodeError for other bytes.

    Use this for every text and JSON file that a user may have edited.
    """
    return file.read_text(encoding="utf-8").removeprefix(MARK)


def read_json(file: Path, flag: str, *, give: str, missing: str = "") -> Any:
    """Read the JSON file given to ``flag``; InputError that says what to give (missing: if there is no file).

    Python's reader accepts NaN and infinity; we reject them and name their key.
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
    """Write ``content`` beside ``file``, sync it, and rename it into place, replacing an old file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_when_done(file) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def replace_when_done(file: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a path to write to; afterwards it is synced and becomes ``file``. A failure leaves ``file`` as it was.

    Its permissions are those of any new file (the umask). InputError if ``overwrite`` is false and ``file`` exists by
    then.
    """
    if file.exists() and not file.is_file():
        raise InputError(f"{file} is not a regular file and will not be replaced; use another path")
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
    """Raise InputError if the directory ``target`` exists without ``overwrite``, or is not ``what``.

    A directory counts as ``what`` if it is empty or holds the file ``marker``.
    """
    if not target.exists():
        return
    if not overwrite:
        raise _exists(target)
    if not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file()):
        raise InputError(f"{target} is not {what} and will not be replaced; use another -o")


@contextlib.contextmanager
def replace_directory_when_done(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    """Yield a new directory to fill; afterwards it is synced and becomes ``target``, which is locked meanwhile.

    check: raises InputError unless ``target`` may be written; called before the work and after it. A failure leaves
    ``target`` as it was, and nothing beside it. A full disk raises InputError. The files get the permissions of any new
    file (the umask).
    """
    with hold(target, again=True):
        check()
        partial = partial_path(target)
        try:
            with explain_full_disk(target):
                partial.mkdir()
                yield partial
                permissions = partial.stat().st_mode & 0o666
                for path in [*partial.rglob("*"), partial]:
                    if path.is_file():
                        _permit(path, permissions)
                    sync(path)
            check()
            move_into_place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def move_into_place(partial: Path, target: Path) -> None:
    """Rename the directory ``partial`` to ``target``; an old directory stays until the new one is in place."""
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
    """Rename a file or directory; InputError if ``target`` exists, even if it appeared at this moment."""
    found = _renameat2(source, target, NO_REPLACE)
    if found == errno.EEXIST or (found in UNSUPPORTED and target.exists()):
        raise _exists(target)
    if found:  # not supported, or an error that rename explains
        source.rename(target)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one atomic step; return False where the system cannot."""
    return _renameat2(first, second, EXCHANGE) == 0


def _renameat2(source: Path, target: Path, flag: int) -> int:
    """Call Linux's rename with a flag; return 0 or the error number, ENOSYS on other systems."""
    with contextlib.suppress(AttributeError, OSError):
        library, here = ctypes.CDLL(None, ctypes.DEFAULT_MODE, None, True), -100  # keeps errno; AT_FDCWD
        failed = library.renameat2(here, os.fsencode(source), here, os.fsencode(target), flag)
        return ctypes.get_errno() if failed else 0
    return errno.ENOSYS


def _permit(file: Path, permissions: int) -> None:
    """Set the permissions of a file, if the file system has any."""
    if file.stat().st_mode & 0o777 != permissions:
        with contextlib.suppress(PermissionError):
            file.chmod(permissions)


def _exists(target: Path) -> InputError:
    return InputError(f"{target} exists; use another -o, or --overwrite to replace it")


def sync(path: Path) -> None:
    """Force a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_full_disk(target: Path) -> Iterator[None]:
    """Turn "no space left" into an InputError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{target} was not written: no space left on the device ({free_bytes(target)} bytes free); "
            "free some space, or use another path"
        ) from None


def check_space(target: Path, needed_bytes: int) -> None:
    """Raise InputError if the disk of ``target`` has less than ``needed_bytes`` free."""
    free = free_bytes(target)
    if free < needed_bytes:
        raise InputError(
            f"{target} needs about {needed_bytes} bytes, its disk has {free} free; free some space, or use another path"
        )


def free_bytes(target: Path) -> int:
    """Return the free bytes on the disk of ``target``, which need not exist yet."""
    existing = next(parent for parent in [target, *target.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free
