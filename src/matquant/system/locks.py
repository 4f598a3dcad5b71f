"""Allow one run at a time per output: a lock beside OUT that lasts as long as the run's process.

The lock is the file ``.OUT.lock``, locked with ``flock``. The system drops the lock when the process ends, however it
ends, so a file left by a killed run locks nothing. The file names the process that holds it, for error messages. It is
deleted at the end of the run; a process that locks a file that was deleted meanwhile tries again.

Where the file system has no ``flock``, the existence of the file is the lock. We cannot tell whether a process on
another machine still runs, so the user has to delete the file of a killed run; the message says which file.

Unfinished output is in ``.OUT.HOST-PID-RANDOM.partial``, a name unique to the writer.
"""

import contextlib
import errno
import functools
import hashlib
import inspect
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from matquant.system import ranks
from matquant.system.arguments import check_types
from matquant.system.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

P = ParamSpec("P")
R = TypeVar("R")

LONGEST_NAME_BYTES = 200  # file systems allow 255, and a partial name is longer than the final one
ATTEMPTS = 1000  # attempts to open a lock that others delete
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
HOST = platform.node()
HOST_MARK = hashlib.sha256(HOST.encode()).hexdigest()[:8]
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())  # by this thread


@contextlib.contextmanager
def hold(out: Path | str, *, again: bool = False) -> Iterator[Path]:
    """Keep every other run from writing ``out``; yields the path to write, with links resolved.

    Missing parent directories are made, and removed again if they are empty at the end. again: the caller may hold
    ``out`` already, as part of a run. Of a run's processes only the first one locks. Raises InputError at once if
    another run holds it, or it cannot be written.
    """
    target = check_place(out)
    if not ranks.leads() or (again and target in _held.get()):
        yield target
        return
    made = _make_parents(target)
    try:
        file = sibling(target, "lock")
        descriptor = _acquire(file, target)
        try:
            _held.set(_held.get() | {target})
            remove_leftovers(target, locked=True)
            yield target
        finally:
            _held.set(_held.get() - {target})
            file.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def holding(argument: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function to hold the path in its ``argument`` while it runs, unless that is None."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> R:
            out = signature.bind(*args, **kwargs).arguments.get(argument)
            if out is None:
                return function(*args, **kwargs)
            with hold(out):
                return function(*args, **kwargs)

        return locked

    return decorate


def check_place(out: Path | str) -> Path:
    """Return the absolute path to write for ``out``, with links resolved; InputError if it cannot be written."""
    check_types(out=out)
    given = Path(out)
    try:
        if given.is_symlink() and not given.exists():
            raise InputError(f"{out} is a link to {given.readlink()}, which does not exist; delete the link")
        target = given.resolve()
        existing = next(parent for parent in target.parents or [target] if parent.exists())
        if not target.name:
            raise InputError(f"{out} is the root directory; use the name of a new file or directory")
        if not existing.is_dir():
            raise InputError(f"{out} cannot be written because {existing} is not a directory; use another path")
        if target.exists() and not target.is_dir() and not target.is_file():
            raise InputError(f"{out} is neither a file nor a directory and will not be replaced; use another path")
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # no permission, too long, a loop of links, a null byte
        raise _unwritable(out, error) from None
    return target


def sibling(file: Path, ending: str) -> Path:
    """Return the hidden path ``.NAME.ending`` beside ``file``."""
    return file.with_name(f".{_stem(file)}.{ending}")


def partial_path(file: Path) -> Path:
    """Return a path beside ``file`` that no other writer uses."""
    return sibling(file, f"{HOST_MARK}-{os.getpid()}-{secrets.token_hex(4)}.partial")


def remove_leftovers(file: Path, *, locked: bool = False) -> None:
    """Delete unfinished files that killed writers of ``file`` left beside it.

    locked: no other writer can be at work, so every unfinished file is a leftover. Otherwise only files left by dead
    processes of this machine are deleted.
    """
    mark = r"(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}"
    pattern = re.compile(rf"\.{re.escape(_stem(file))}\.(?:{mark}\.)?partial")
    try:
        beside = list(file.parent.iterdir())
    except OSError:  # a directory we may write to but not list
        return
    for found in beside:
        match = pattern.fullmatch(found.name)
        if match and (locked or (match["host"] == HOST_MARK and not _is_running(int(match["pid"])))):
            delete(found)


def delete(path: Path) -> None:
    """Delete a file, a link or a directory, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _stem(file: Path) -> str:
    name = os.fsencode(file.name)
    return file.name if len(name) <= LONGEST_NAME_BYTES else hashlib.sha256(name).hexdigest()


def _make_parents(target: Path) -> list[Path]:
    """Make the directories above ``target``; returns those that were missing, the deepest first."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        if missing:
            target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from None
    return missing


def _acquire(file: Path, target: Path) -> int:
    """Lock the file and return its descriptor; InputError if another run holds the lock."""
    for _ in range(ATTEMPTS):
        opened = _open(file, target)
        if opened is None:
            continue
        descriptor, created = opened
        supported = True
        try:
            supported = _lock(descriptor)
            if not supported and not created:
                raise BlockingIOError
            if not supported or _is_still(file, descriptor):
                _sign(descriptor)
                return descriptor
        except BlockingIOError:
            message = _busy(file, target, _read_owner(descriptor), certain=supported)
            os.close(descriptor)
            raise InputError(message) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise InputError(f"{target} cannot be written because its lock {file} comes and goes; use another path")


def _open(file: Path, target: Path) -> tuple[int, bool] | None:
    """Return a descriptor of ``file`` and whether this call created it; None to try again."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        try:
            return os.open(file, flags | os.O_EXCL, 0o666), True
        except FileExistsError:
            return os.open(file, flags, 0o666), False
    except FileNotFoundError as error:  # another run removed the parents that it had made
        if target.parent.is_dir():
            raise _unwritable(target, error) from None
        _make_parents(target)
        return None
    except OSError as error:
        raise _unwritable(target, error) from None


def _lock(descriptor: int) -> bool:
    """Lock an open file; return False where locks are not supported. BlockingIOError if another run has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def _is_still(file: Path, descriptor: int) -> bool:
    """Return whether the path still leads to the open file, which its last owner may have deleted meanwhile."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write who holds the lock. This only serves messages, so a full disk does not matter."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"host": HOST, "pid": os.getpid()}).encode())


def _read_owner(descriptor: int) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        owner = json.loads(os.read(descriptor, 4096))
        if isinstance(owner, dict) and type(owner.get("pid")) is int:
            return owner
    return {}


def _busy(file: Path, target: Path, owner: dict[str, Any], *, certain: bool) -> str:
    """Return why ``target`` is in use. certain: a run is at work; else its lock file may be left over."""
    who = f"process {owner['pid']}" if owner else "an unknown process"
    if owner and owner.get("host") != HOST:
        who += f" on {owner.get('host')}"
    elif owner and not _is_running(owner["pid"]):
        who = "an unknown process"
    if certain:
        return f"another run is writing {target} ({who}); wait until it has ended, or use another path"
    return f"another run is writing {target} according to {file} ({who}); delete that file if the run has ended"


def _is_running(pid: int) -> bool:
    if os.name != "posix":  # signal 0 is Ctrl-C there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # another user's process
    return True


def _unwritable(out: Path | str, error: Exception) -> InputError:
    return InputError(f"{out} cannot be written ({getattr(error, 'strerror', None) or error}); use another path")
