"""Read config.json with transformers: without its progress bars and advice, and with its errors in our words."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import GENERATION_CONFIG_NAME

from matquant.format.facts import GENERATION, REPAIR, read_facts
from matquant.format.manifest import side_file
from matquant.hf.source import LOADABLE, check_source
from matquant.hf_torch.ties import Model
from matquant.system.errors import InputError

CONTEXT = 2048  # tokens


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and advice."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


@contextlib.contextmanager
def loading(source: Path | str) -> Iterator[None]:
    """Loading from ``source`` without transformers' noise; its errors in our words."""
    check_source(source)
    try:
        with quiet():
            yield
    except InputError:
        raise
    except Exception as error:  # of every kind: transformers and torch read files that anyone may have written
        raise InputError(f"{source} cannot be loaded as a model ({reason(error)}); {LOADABLE}") from None


def reason(error: Exception) -> str:
    """What went wrong, on one line: the first one, or of transformers' checks of a configuration the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if type(error).__name__.startswith("StrictDataclass") and len(lines) > 1:
        return lines[1].partition(": ")[2] or lines[1]  # after "Class validation error for validator"
    return lines[0] if lines else type(error).__name__


def parse_config(config: Mapping[str, Any]) -> Any:
    """The configuration that a config.json holds; transformers writes infinity as {"__float__": "Infinity"} in it."""

    def decode(part: dict[str, Any]) -> Any:
        return float(part["__float__"]) if "__float__" in part else part

    try:
        return transformers.AutoConfig.for_model(**json.loads(json.dumps(dict(config)), object_hook=decode))
    except Exception as error:  # of every kind, as in ``loading``
        raise InputError(f"config.json describes no model ({reason(error)}); repair it") from None


def generation_config(directory: Path) -> Any:
    """transformers' generation settings beside a checkpoint, None if there are none; InputError for wrong ones."""
    file = side_file(directory, GENERATION_CONFIG_NAME)
    if file is None:
        return None
    read_facts(file, GENERATION)
    try:
        return transformers.GenerationConfig.from_pretrained(directory)
    except Exception as error:  # of every kind, as in ``loading``
        raise InputError(f"{file} cannot be read ({reason(error)}); {REPAIR}") from None


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """Rows of the embedding of a model of ``config``."""
    return int(parse_config(config).get_text_config().vocab_size)


def config_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that ``build_model`` gives a model of ``config`` unless told otherwise."""
    dtype: torch.dtype | None = parse_config(config).dtype
    return dtype or torch.float32


def context_length(model: Model) -> int:
    """The context the model was made for, in tokens; CONTEXT if its configuration names none (BLOOM, Mamba)."""
    config = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return int(found or CONTEXT)


def check_context(model: Model, seq_len: int) -> None:
    """InputError if ``seq_len`` is more than a model with learned positions can read (rotary ones have no end)."""
    context = context_length(model)
    learned = any(re.search(r"embed_positions|wpe|position_embeddings", name) for name, _ in model.named_parameters())
    if learned and seq_len > context:
        raise InputError(f"seq_len={seq_len} is longer than the model's context, {context}; give at most {context}")
