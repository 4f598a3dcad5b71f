"""Read config.json with transformers, without its progress bars and advice, and with its errors reworded."""

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
from matquant.hf_torch import Model
from matquant.system.errors import InputError

CONTEXT = 2048  # tokens


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and advice."""
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
    """Load from ``source`` without transformers' noise, and reword its errors."""
    check_source(source)
    try:
        with quiet():
            yield
    except InputError:
        raise
    except Exception as error:  # any type: transformers and torch read files from anywhere
        raise InputError(f"{source} cannot be loaded as a model ({reason(error)}); {LOADABLE}") from None


def reason(error: Exception) -> str:
    """Return an error's message in one line: the first line, or the second for transformers' configuration checks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if type(error).__name__.startswith("StrictDataclass") and len(lines) > 1:
        return lines[1].partition(": ")[2] or lines[1]  # after "Class validation error for validator"
    return lines[0] if lines else type(error).__name__


def parse_config(config: Mapping[str, Any]) -> Any:
    """Parse the configuration in a config.json, where transformers writes infinity as {"__float__": "Infinity"}."""

    def decode(part: dict[str, Any]) -> Any:
        return float(part["__float__"]) if "__float__" in part else part

    try:
        return transformers.AutoConfig.for_model(**json.loads(json.dumps(dict(config)), object_hook=decode))
    except Exception as error:  # any type, as in ``loading``
        raise InputError(f"config.json does not describe a model ({reason(error)}); repair it") from None


def generation_config(directory: Path) -> Any:
    """Return a checkpoint's transformers generation settings, None if there are none; InputError for wrong ones."""
    file = side_file(directory, GENERATION_CONFIG_NAME)
    if file is None:
        return None
    read_facts(file, GENERATION)
    try:
        return transformers.GenerationConfig.from_pretrained(directory)
    except Exception as error:  # any type, as in ``loading``
        raise InputError(f"{file} cannot be read ({reason(error)}); {REPAIR}") from None


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """Return the number of rows of the embedding of a model of ``config``."""
    return int(parse_config(config).get_text_config().vocab_size)


def config_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the default dtype of a model of ``config``."""
    dtype: torch.dtype | None = parse_config(config).dtype
    return dtype or torch.float32


def context_length(model: Model) -> int:
    """Return the model's context in tokens; CONTEXT if its configuration names none (BLOOM, Mamba)."""
    return configured_context(model.config)


def configured_context(parsed: Any) -> int:
    """Return the context in tokens that a parsed configuration names, else CONTEXT."""
    config = parsed.get_text_config()
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return int(found or CONTEXT)


def check_context(model: Model, seq_len: int) -> None:
    """Raise InputError if ``seq_len`` exceeds learned positions (rotary positions have no limit)."""
    context = context_length(model)
    learned = any(re.search(r"embed_positions|wpe|position_embeddings", name) for name, _ in model.named_parameters())
    if learned and seq_len > context:
        raise InputError(
            f"seq_len={seq_len} is longer than the model's context of {context} tokens; use at most {context}"
        )
