"""Models on the Hugging Face hub: the only file that imports huggingface_hub."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from matquant.system.errors import InputError

TIMEOUT_S = 3.0
CONFIG = "config.json"


def find_snapshot(name: str) -> Path | None:
    """Return the local snapshot of a hub id with its config.json; None if the hub cannot be asked but the cache
    suffices.

    Queries the hub once, without retries. InputError if there is no such model, or it is neither in the cache nor
    reachable.
    """
    cached = huggingface_hub.try_to_load_from_cache(name, CONFIG)
    if isinstance(cached, str):
        return Path(cached).parent
    if constants.is_offline_mode():
        raise InputError(
            f"{name} is neither a local directory nor in the hub's cache, and HF_HUB_OFFLINE forbids network access; "
            "give a Hugging Face model directory, or download the model first"
        )
    url = huggingface_hub.hf_hub_url(name, CONFIG)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT_S, token=huggingface_hub.get_token())
    except errors.GatedRepoError:
        raise InputError(
            f"{name} is a gated model; accept its terms on the hub and log in with: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{name} is neither a local directory nor a model on the hub (a private one needs: hf auth login); "
            "give a Hugging Face model directory, a GGUF file or a hub id"
        ) from None
    except errors.EntryNotFoundError:
        raise InputError(
            f"{name} on the hub has no config.json, so it is a LoRA adapter, GGUF files or not a language model; "
            "give a float Hugging Face model"
        ) from None
    except Exception as error:  # the client's transport raises many types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name} is neither a local directory nor in the hub's cache, and the hub cannot be reached ({reason}); "
            "give a Hugging Face model directory, or try again with a network connection"
        ) from None
    return Path(huggingface_hub.hf_hub_download(name, CONFIG)).parent


def fetch_files(name: str, files: Sequence[str]) -> Path | None:
    """Return the local snapshot of a hub id after fetching those of ``files`` that it has; without a network, cached
    files only.

    None if nothing is cached.
    """
    with contextlib.suppress(OSError, ValueError):  # the hub's own errors are OSErrors
        disable_progress_bars()
        try:
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
        finally:
            enable_progress_bars()
    with contextlib.suppress(ValueError):
        cached = huggingface_hub.try_to_load_from_cache(name, CONFIG)
        return Path(cached).parent if isinstance(cached, str) else None
    return None


# --------------------------------------------------------------------------------------------------------- repositories


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A model repository at a commit, which no later push changes. files: paths in it."""

    name: str
    commit: str
    files: frozenset[str]


def find_repository(name: str, *, revision: str | None = None) -> Repository:
    """Return a repository at a revision (None: its newest commit); InputError if it cannot be read."""
    with _explained(name, revision=revision):
        found = huggingface_hub.HfApi().model_info(name, revision=revision)
        return Repository(
            name=name, commit=str(found.sha), files=frozenset(file.rfilename for file in found.siblings or ())
        )


def fetch(repository: Repository, path: str, to: Path, *, size: int | None, report: Callable[[int], None]) -> None:
    """Download a file of a repository into ``to``, from where an interrupted download ended.

    size: of the whole file, bytes; None: not known, and the download starts again. report: called with the bytes
    received since the last call. A lost connection is tried again a few times. InputError if that fails; what has
    arrived is kept.
    """
    url = huggingface_hub.hf_hub_url(repository.name, path, revision=repository.commit)
    to.parent.mkdir(parents=True, exist_ok=True)
    if size is None or (to.exists() and to.stat().st_size > size):
        to.unlink(missing_ok=True)
    with to.open("ab") as stream, _explained(repository.name, path=path, revision=repository.commit), _quiet():
        # Compressed bytes could not be counted, nor the rest of them fetched.
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        counted: Any = _Counted(stream, report)
        http_get(url, counted, resume_size=stream.tell(), headers=headers, expected_size=size)


class _Counted:
    """A file that reports what is written to it."""

    def __init__(self, stream: Any, report: Callable[[int], None]) -> None:
        self._stream, self._report = stream, report

    def write(self, data: bytes) -> int:
        self._report(len(data))
        return int(self._stream.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def commit_files(
    name: str, files: Mapping[str, Path | bytes], *, delete: Sequence[str], revision: str | None, message: str
) -> str:
    """Upload files, path in the repository -> file or content, and commit them at once; return the commit's URL.

    Files that the hub has already are not sent again. A failed upload changes nothing in the repository.
    """
    api = huggingface_hub.HfApi()
    operations: list[Any] = [
        huggingface_hub.CommitOperationAdd(
            path_in_repo=path, path_or_fileobj=str(data) if isinstance(data, Path) else data
        )
        for path, data in files.items()
    ]
    operations += [huggingface_hub.CommitOperationDelete(path_in_repo=path) for path in delete]
    with _explained(name, revision=revision), _quiet():
        return str(api.create_commit(name, operations, commit_message=message, revision=revision).commit_url)


def make_repository(name: str, *, private: bool, revision: str | None) -> Repository:
    """Make a model repository unless it exists, and return it at a branch; InputError if that is not allowed."""
    with _explained(name):
        huggingface_hub.HfApi().create_repo(name, private=private or None, exist_ok=True)
    return find_repository(name, revision=revision)


def check_name(name: str) -> None:
    """Raise InputError unless ``name`` is USER/REPO."""
    with contextlib.suppress(errors.HFValidationError):
        validate_repo_id(name)
        if "/" in name:
            return
    raise InputError(f"{name!r} is not the name of a repository on the hub; give USER/REPO")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Show no progress bars of the client's."""
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _explained(name: str, *, path: str | None = None, revision: str | None = None) -> Iterator[None]:
    """Turn the errors of the client into one InputError that says what to do."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the client's transport raises many types
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise InputError(_reason(name, cause, path, revision)) from None


def _reason(name: str, error: BaseException, path: str | None, revision: str | None) -> str:
    """Return what went wrong and what to do."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is a gated model; accept its terms on the hub and log in with: hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} on the hub has no revision {revision}; give another, or pull into a new directory"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{name} on the hub has no {path}; ask its owner to push it again"
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return "the hub does not accept this login (401); log in again with: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name} is not on the hub, or is private ({status}); check the name, or log in with: hf auth login"
    if status == 403:
        return f"this login may not use {name} that way (403); log in with a token that may: hf auth login"
    if status == 429:
        wait = response.headers.get("Retry-After") if response is not None else None
        later = f"in {wait} s" if wait else "later"
        return f"the hub has had too many requests from here (429); try again {later}: what has arrived is kept"
    if isinstance(error, OSError) and error.errno is not None:  # of this machine
        raise error
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = f"the hub answered {status} for {name}" if status else f"the hub cannot be reached for {name} ({said})"
    return f"{what}; try again: what has arrived is kept"
