"""Load one width of a nested checkpoint through transformers' ``from_pretrained``:

    AutoModelForCausalLM.from_pretrained(directory, quantization_config=matquant.MatQuantConfig(bits=4))

While transformers loads the shards, every quantised weight is sliced and made dense in the dtype and on the device of
the model, one at a time. The result is an ordinary float model, equal to ``matquant.load(directory, bits=4,
kernels="none")`` bit for bit. It has no ``quantization_config``: it can be trained, and ``save_pretrained`` writes the
slice as an ordinary float checkpoint. Importing this module registers the class with transformers, which does not look
for other packages; ``matquant.MatQuantConfig`` imports it.

The config.json of a nested checkpoint names compressed-tensors, so that other tools read it as an int8 model, and
transformers rejects a configuration of another class than the stored one. Its one exception,
``quantizers.auto.LOADING_ATTRIBUTES_CONFIG_TYPES``, needs equal class names and warns that the stored configuration
will be used. So we replace ``merge_quantization_configs``, the function that rejects it, by one that first checks for
our configuration. This is the only step here that uses no public interface of transformers.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from matquant.core.experts import EXPERTS, TENSORS
from matquant.core.nest import MASTER_BITS
from matquant.core.spec import Plan
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.hf_torch import Model
from matquant.integrations.words import read_words
from matquant.system.errors import InputError

METHOD = "matquant"
# all are collected, two are used
STORED = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")

Tensors = dict[str, list[torch.Tensor]]  # by pattern, in the order of their names in the checkpoint


class MatQuantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Read a nested checkpoint at ``bits`` bits, or at a plan {path: bits} over them; ``plan`` may be a plan file.

    check_hashes: compare every file with the manifest first. Raises InputError for widths outside 1..8 and bad plan
    files; ``from_pretrained`` raises it for directories that are not nested checkpoints and for plans that do not fit.
    """

    quant_method = METHOD
    dequantize = True  # for transformers: the loaded model is dense and drops this configuration

    def __init__(
        self,
        bits: int = MASTER_BITS,
        *,
        plan: Mapping[str, int] | Plan | Path | str | None = None,
        check_hashes: bool = True,
    ) -> None:
        asked = Plan.over(bits, plan)
        self.bits, self.plan = asked.default, dict(asked.bits)
        self.check_hashes = check_hashes


class MatQuantQuantizer(HfQuantizer):  # type: ignore[misc]
    """Hooks that transformers calls while it loads a model, in this order.

    checkpoint, bits: the checkpoint, and the width of every path. paths: (parameter, pattern) -> the quantised weights
    that are loaded into it, in transformers' order; the pattern comes from its conversion, "weight" without one.
    conversions: those of the model's class.
    """

    serialized_names = {"weight": list(STORED)}  # noqa: RUF012 (transformers' own shape)
    is_trainable = True
    checkpoint: Checkpoint
    bits: Mapping[str, int]
    paths: dict[tuple[str, str], list[str]]
    conversions: list[Any]

    def is_serializable(self) -> bool:
        return True

    def get_load_operations(self) -> dict[str, type]:
        return {"dequantize": _Slice}

    def _process_model_before_weight_loading(self, model: Model, **_: Any) -> None:
        """Open the checkpoint: an InputError raised while weights are loaded would be hidden by transformers."""
        config, directory = self.quantization_config, model.config.name_or_path
        if getattr(model.config, "distributed_config", None) is not None:
            raise InputError(
                f"{directory} cannot be split across devices while loading, because its weights are sliced whole; "
                "drop tp_plan and distributed_config, or load it, save_pretrained, and split that checkpoint"
            )
        self.checkpoint = open_checkpoint(directory, check_hashes=config.check_hashes)
        self.bits = self.checkpoint.widths(Plan(default=config.bits, bits=config.plan))

    def update_weight_conversions(self, weight_conversions: list[Any], model: Model) -> list[Any]:
        """Find the parameter of each weight by transformers' renaming, and add ``_Slice`` to its conversion."""
        self.conversions = weight_conversions
        weight_conversions = [*_joins(self.checkpoint), *weight_conversions]
        self.paths = {}
        renamings = [entry for entry in weight_conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in weight_conversions if isinstance(entry, WeightConverter)]
        known = model.state_dict()
        for path in sorted(self.checkpoint.shapes, key=dot_natural_key):
            name, pattern = rename_source_key(f"{path}.weight", renamings, converters, model.base_model_prefix, known)
            if name not in known:
                raise InputError(
                    f"{self.checkpoint.directory} quantises {path}, which {type(model).__name__} does not have; "
                    "load it with the class that it was made from"
                )
            self.paths.setdefault((name, pattern or "weight"), []).append(path)
        for name in self.checkpoint.joined():  # marks the model's own renaming as used, so that it is saved with it
            rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        return list(super().update_weight_conversions(weight_conversions, model))

    def _process_model_after_weight_loading(self, model: Model, **_: Any) -> Model:
        """Restore the conversions of an unquantised model: transformers saves with the conversions it loaded with."""
        model._weight_conversions = [entry for entry in self.conversions if entry.was_used()]
        return model


def _joins(checkpoint: Checkpoint) -> list[WeightConverter]:
    """Return conversions of experts' weights to the tensors that hold all experts in the model's own files."""
    experts = checkpoint.spec.experts
    found = []
    for kind in {} if experts is None else experts.names:
        parts = [rf"\.{EXPERTS}.*.{part}.weight" for part in TENSORS[kind]]
        found.append(WeightConverter(parts, rf"\.{EXPERTS}.{kind}", operations=[_Join(checkpoint)]))
    return found


class _Operation(ConversionOps):  # type: ignore[misc]
    """A step of transformers' conversion that is never copied or reversed."""

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # transformers copies the operations for every parameter

    @property
    def reverse_op(self) -> ConversionOps:
        """Never called: a loaded model keeps the conversions of ``update_weight_conversions``."""
        raise NotImplementedError


class _Join(_Operation):
    """Write the weights [N, K] of all experts into the tensor that holds them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def convert(
        self,
        input_dict: Tensors,
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: Model,
        **_: Any,
    ) -> dict[str, Any]:
        """Convert lists of weights by pattern, in the order of the experts, to one tensor."""
        parameter, experts = model.get_parameter(full_layer_name), self.checkpoint.spec.experts
        assert experts is not None
        kind = full_layer_name.rpartition(".")[2]
        weights = {
            f"{number}.{pattern.split('.')[-2]}": weight
            for pattern, found in input_dict.items()
            for number, weight in enumerate(found)
        }
        joined = torch.empty(parameter.shape, dtype=parameter.dtype, device=next(iter(weights.values())).device)
        for key, place in experts.places(kind, tuple(parameter.shape)).items():
            joined.as_strided(*place).copy_(weights[key])
        return {full_layer_name: joined}


class _Slice(_Operation):
    """Convert the stored tensors of one parameter to weights [N, K]: the first step of transformers' conversion."""

    def __init__(self, hf_quantizer: MatQuantQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: Tensors,
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: Model,
        **_: Any,
    ) -> dict[str, Any]:
        """Convert tensors by pattern ("experts.*.up_proj.weight_packed") to weights by "experts.*.up_proj.weight"."""
        quantizer, dtype = self.hf_quantizer, model.get_parameter(full_layer_name).dtype
        found = {}
        for pattern in (pattern for pattern in source_patterns if pattern.endswith("weight")):
            paths = quantizer.paths.get((full_layer_name, pattern))
            weights = input_dict.get(pattern, [])
            if paths is not None:
                packed = zip(paths, input_dict[f"{pattern}_packed"], strict=True)
                weights = [
                    read_words(quantizer.checkpoint, path, words, quantizer.bits[path]) for path, words in packed
                ]
            found[pattern] = [weight.to(dtype) for weight in weights]
        # if the class has no conversion, transformers uses the whole name
        return {full_layer_name: found["weight"][0]} if source_patterns[0] == "weight" else found


_merge = AutoHfQuantizer.merge_quantization_configs
_merge = getattr(_merge, "__wrapped__", _merge)  # after importlib.reload: unwrap ours to get transformers' function


@functools.wraps(_merge)
def _merge_ours(stored: Any, given: Any) -> Any:
    """Merge as transformers does, but let a MatQuantConfig from the user replace the stored configuration."""
    return given if getattr(given, "quant_method", None) == METHOD else _merge(stored, given)


AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge_ours)
if METHOD not in AUTO_QUANTIZER_MAPPING:  # importlib.reload; transformers rejects a second one
    register_quantizer(METHOD)(MatQuantQuantizer)
