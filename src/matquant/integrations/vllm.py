"""Serve a nested checkpoint in vLLM at any width or plan:

    vllm serve DIR --hf-overrides '{"quantization_config": {"quant_method": "matquant", "bits": 4}}'

Installing matquant beside vLLM is enough: the entry point ``vllm.general_plugins`` finds this module, the only file
that imports ``vllm``. vLLM streams the shards; when a ``weight_packed`` arrives, it is sliced, made dense on the
model's device and in its dtype, and passed to the loader of the unquantised layer, which stacks q, k and v, or gate and
up, and takes this rank's part. So every rule, group size, zero-point and width is served exactly, and tensor
parallelism, compilation and adapters work as for a float model. The cost is that of a float model too: at any width,
weights take 16 bits in memory and in every step.
"""

import functools
from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import BasevLLMParameter

from matquant.core.nest import MASTER_BITS
from matquant.core.spec import Plan
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.integrations.words import check_stacked, read_overrides, read_words, stacked_paths
from matquant.system.errors import InputError

METHOD = "matquant"
DROPPED = (
    *(".weight_scale", ".weight_shape", ".weight_zero_point"),
    *(f".{bits}.{part}" for bits in range(1, MASTER_BITS + 1) for part in ("scale", "zero")),
)
SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names for the parts of qkv_proj; other parts have numbers


@functools.cache
def _open(directory: str) -> Checkpoint:
    """Open the checkpoint; its hashes are checked once in every process that loads weights."""
    return open_checkpoint(directory)


class NestedConfig(QuantizationConfig):  # type: ignore[misc]
    """vLLM's configuration of a model. It is copied and sent to other processes, so it holds no open files.

    plan: the requested plan. directory, bits: the model's directory, and the width of every path.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.directory = ""
        self.bits: dict[str, int] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NestedConfig":
        return cls(read_overrides(config))

    def maybe_update_config(self, model_name: str, **_: Any) -> None:
        """Check the plan before anything starts; vLLM passes the model's directory only here."""
        self.directory = model_name
        checkpoint = open_checkpoint(model_name, check_hashes=False)
        if checkpoint.ends:
            raise InputError(
                f"{model_name} quantises {checkpoint.ends[0]}, and the plugin supports only linear layers: "
                "quantise with --scope linears, or export with --to dense or compressed-tensors"
            )
        self.bits = checkpoint.widths(self.plan)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # any device: products are those of a float model

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Drop the tensors that we read from the checkpoint ourselves; without an index vLLM reads its slices too."""
        return WeightsMapper(orig_to_new_suffix=dict.fromkeys(DROPPED))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            paths = stacked_paths(prefix, self.packed_modules_mapping)
            if not any(path in self.bits for path in paths):
                return UnquantizedLinearMethod()
            check_stacked(prefix, paths, self.bits)
            return NestedLinearMethod(_open(self.directory), paths, self.bits)
        inside = next((path for path in self.bits if path.startswith(f"{prefix}.")), None)
        if inside is not None:
            raise InputError(
                f"{self.directory} quantises {inside}, which is part of a {type(layer).__name__} in vLLM; "
                "the plugin supports only linear layers: quantise with --exclude experts, or export with --to dense"
            )
        return None


@register_weight_loader_v2_supported_method
class NestedLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """A float linear layer that is loaded from codes. paths: of the weights stacked in it; bits: path -> width."""

    def __init__(self, checkpoint: Checkpoint, paths: list[str], bits: dict[str, int]) -> None:
        super().__init__()
        self.checkpoint, self.paths, self.bits = checkpoint, paths, bits
        self.missing = {path for path in paths if path in bits}

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **options: Any) -> None:
        super().create_weights(layer, *sizes, **options)
        nothing = torch.empty(0, dtype=torch.int32)
        load = functools.partial(self._load, layer.weight)
        layer.register_parameter("weight_packed", BasevLLMParameter(data=nothing, weight_loader=load))

    def _load(self, weight: Any, _: Any, words: torch.Tensor, shard: str | int | None = None) -> None:
        """Slice stored words as they arrive, and load the slice as an ordinary weight."""
        path = self.paths[SHARDS[shard] if isinstance(shard, str) else shard or 0]
        dense = read_words(self.checkpoint, path, words.to(weight.device), self.bits[path], dtype=weight.dtype)
        self.missing.discard(path)
        weight.weight_loader(weight, dense, *([] if shard is None else [shard]))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that every weight has arrived, which vLLM checks only for float models."""
        if self.missing:
            raise InputError(
                f"vLLM built a {type(layer).__name__} for {min(self.missing)} but never loaded it; "
                "serve a slice: matquant export --to dense"
            )
        del layer.weight_packed
        super().process_weights_after_loading(layer)


def register() -> None:
    """Register the plugin; vLLM calls this in each of its processes."""
    register_quantization_config(METHOD)(NestedConfig)
