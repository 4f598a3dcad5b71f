"""Models on the Hugging Face hub: the only file that imports huggingface_hub."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars  # type: ignore[attr-defined]

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
