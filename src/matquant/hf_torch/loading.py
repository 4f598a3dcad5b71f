"""Load a whole float model, build a model from tensors, and load a tokenizer, with transformers' classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import CONFIG_NAME

from matquant.format.manifest import listed_only
from matquant.hf.gguf import as_directory
from matquant.hf.panics import check_merges, one_line
from matquant.hf.sidefiles import missing_packages, readable
from matquant.hf_torch import Model
from matquant.hf_torch.config import generation_config, loading, parse_config, quiet, reason
from matquant.hf_torch.sizes import (
    check_dtypes,
    check_files,
    check_fits,
    check_loaded,
    check_unused_tensors,
    compare_sizes,
)
from matquant.hf_torch.ties import head_name, record_ties
from matquant.system.errors import InputError


def load_float(source: Path | str, *, dtype: torch.dtype | None = None) -> Model:
    """Load the float model of a directory, a GGUF file or a hub id, in evaluation mode; ``dtype`` None keeps theirs."""
    with as_directory(source) as directory:
        model = _load_directory(directory, dtype)
    model.config.name_or_path = str(source)
    return model


def _load_directory(source: Path | str, dtype: torch.dtype | None) -> Model:
    with loading(source), readable(source) as place:
        config = float_config(source)
        check_fits(source, config)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            place, config=config, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
        check_dtypes(source)
    head = head_name(model)
    remedy = "repair the model"
    if info["missing_keys"] == {head}:
        remedy = f'add it, or "tie_word_embeddings": true to {CONFIG_NAME} if the head is the embedding'
    check_loaded(info, source, ("missing_keys", "mismatched_keys"), remedy)
    check_unused_tensors(model, source, info)
    record_ties(model)
    return model.eval()


def float_config(source: Path | str) -> Any:
    check_files(source)
    with readable(source) as place:
        config = transformers.AutoConfig.from_pretrained(place)
    config.name_or_path = str(source)
    if getattr(config, "quantization_config", None):
        raise InputError(f"{source} is quantised already; give the float model it was made from")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{source} is a {config.model_type} model, not a causal language model; give one")
    return config


def hidden_size(source: Path | str) -> int:
    """Return the hidden size of a model, from its configuration alone."""
    with loading(source):
        return int(float_config(source).get_text_config().hidden_size)


def build_model(
    config: Mapping[str, Any], state: Mapping[str, torch.Tensor], *, directory: Path, dtype: torch.dtype | None
) -> Model:
    """Build a model of ``config`` with weights ``state`` (checkpoint names); InputError for missing or wrong ones."""
    with quiet():
        parsed = parse_config(config)
        try:
            cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)]
            compare_sizes(directory, parsed, {name: tuple(tensor.shape) for name, tensor in state.items()})
            model, info = cls.from_pretrained(
                None, config=parsed, state_dict=dict(state), dtype=dtype or parsed.dtype, output_loading_info=True
            )
        except InputError:
            raise
        except Exception as error:  # any type, as in ``config.loading``
            raise InputError(
                f"{directory} does not fit its config.json ({reason(error)}); write the checkpoint again"
            ) from None
        problems = ("missing_keys", "mismatched_keys", "unexpected_keys")
        check_loaded(info, directory, problems, "write the checkpoint again")
        model.generation_config = generation_config(directory) or model.generation_config
    model.config.name_or_path = str(directory)
    return model.eval()


def load_tokenizer(source: Path | str) -> Any:
    """Load a model's tokenizer; InputError if it is missing, or a package that transformers needs for it."""
    check_merges(Path(source) / "tokenizer.json")
    there = (Path(source) / "tokenizer.json").is_file()
    remedy = "repair its tokenizer files" if there else "put tokenizer.json beside the model"
    try:
        with (
            quiet(),
            listed_only(Path(source)) as where,
            readable(source if where == Path(source) else where) as place,
            one_line(f"{source} has no usable tokenizer", remedy),
        ):
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            tokenizer.decode(tokenizer.encode("a b"))  # some damage shows only here
            tokenizer.name_or_path = str(source)
    except InputError:
        missing = missing_packages(source)
        if missing is None:
            raise
        raise InputError(
            f"{source} has its tokenizer in {missing.file}, which needs {missing.packages}; "
            f"pip install {missing.packages}, or put tokenizer.json beside the model"
        ) from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers' result without any files
        raise InputError(f"{source} has no usable tokenizer (no vocabulary); put tokenizer.json beside the model")
    return tokenizer
