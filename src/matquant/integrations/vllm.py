"""Serve a nested checkpoint in vLLM at any width or plan:

    vllm serve DIR --hf-overrides '{"quantization_config": {"quant_method": "matquant", "bits": 4}}'

Installing matquant beside vLLM is enough: the entry point ``vllm.general_plugins`` finds this module; only it and
vllm_experts.py import ``vllm``. vLLM streams the shards. When a ``weight_packed`` arrives, its codes, scales and
zero-points go through the layer's own loader, which stacks q, k and v, or gate and up, and takes this rank's part. What
becomes of them is the choice of ``kernels``, for every linear layer; fused experts are always dense:

    planes    bit planes of the rank's codes (ranks.py); a product reads the bits of its width, one custom operator
              that vLLM compiles and captures like any other. Widths are switched in place by ``Widths``.
    dense     a float weight of the slice, as of an unquantised layer: exact for every rule, group size, zero-point,
              width and device, at 16 bits per weight in memory and in every step.
    auto      planes where they serve, else dense, with the reason in vLLM's log.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
)
from vllm.platforms import current_platform

from matquant.core.nest import MASTER_BITS
from matquant.core.spec import Plan
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.integrations.ranks import affines, make_planes, own_widths, product, select, why_dense
from matquant.integrations.vllm_experts import (
    STREAMED,
    DenseExpertsMethod,
    check_supported,
    is_streamed,
    paths_of,
)
from matquant.integrations.words import (
    check_loaded,
    check_widest,
    read_codes,
    read_kernels,
    read_overrides,
    read_words,
    stacked_paths,
)
from matquant.system.errors import InputError

METHOD = "matquant"
WORDS = ".weight_packed"
DROPPED = re.compile(r"\.(weight_(scale|shape|zero_point)|[1-8]\.(scale|zero))$")
LOGGER = init_logger(f"vllm.{__name__}")  # vLLM shows its own loggers
SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names for the parts of qkv_proj; other parts have numbers


@functools.cache
def _open(directory: str) -> Checkpoint:
    """Open the checkpoint; its hashes are checked once in every process that loads weights."""
    return open_checkpoint(directory)


class NestedConfig(QuantizationConfig):  # type: ignore[misc]
    """vLLM's configuration of a model. It is copied and sent to other processes, so it holds no open files.

    plan: the requested plan. kernels: one of words.KERNELS. max_bits: the widest width in memory, of planes. directory,
    bits: the model's directory, and the width of every path. paths: vLLM's name of a quantised module -> its path.
    renamed: ends of tensors' names, and what they become.
    """

    def __init__(self, plan: Plan, kernels: str, max_bits: int) -> None:
        super().__init__()
        self.plan, self.kernels, self.max_bits = plan, kernels, max_bits
        self.directory = ""
        self.bits: dict[str, int] = {}
        self.paths: dict[str, str] = {}
        self.renamed: dict[str, str] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NestedConfig":
        return cls(read_overrides(config), *read_kernels(config))

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
        self.paths = {path: path for path in self.bits}
        if self.kernels != "dense":
            check_widest(self.bits, max_bits=self.max_bits)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Learn the names of the quantised modules in vLLM's model, such as ``attn`` for ``self_attn`` of gpt-oss."""
        renamed = ((hf_to_vllm_mapper.map_name(f"{path}{WORDS}"), path) for path in self.bits)
        self.paths = {name.removesuffix(WORDS): path for name, path in renamed if name is not None}

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # any device: where planes do not serve, products are those of a float model

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Drop the tensors that we read from the checkpoint ourselves; without an index vLLM reads its slices too."""
        return WeightsMapper(orig_to_new_regex={DROPPED: None}, orig_to_new_suffix=self.renamed)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            paths = [self.paths.get(name, name) for name in stacked_paths(prefix, self.packed_modules_mapping)]
            if not any(path in self.bits for path in paths):
                return UnquantizedLinearMethod()
            return self._method(layer, prefix, paths)
        inside = {path for name, path in self.paths.items() if name.startswith(f"{prefix}.")}
        named = paths_of(layer, prefix) if isinstance(layer, RoutedExperts) else {}
        experts = {key: self.paths.get(name, name) for key, name in named.items()}
        unknown = inside.difference(experts.values())
        if unknown:
            raise InputError(
                f"{self.directory} quantises {min(unknown)}, which is part of a {type(layer).__name__} in vLLM; "
                "the plugin does not support that: quantise with --exclude experts, or export with --to dense"
            )
        return self._experts(layer, prefix, experts) if inside else None

    def _experts(self, layer: RoutedExperts, prefix: str, paths: dict[tuple[int, str], str]) -> DenseExpertsMethod:
        """Return how vLLM's fused experts are loaded."""
        check_supported(layer, prefix)
        if self.kernels == "planes":
            raise InputError(f"kernels='planes' cannot hold the experts in {prefix}; use kernels 'auto' or 'dense'")
        if self.kernels != "dense":
            LOGGER.info_once("matquant: dense 16-bit weights of experts, because planes are for linear layers")
        if is_streamed(layer):
            self.renamed = STREAMED
        return DenseExpertsMethod(layer, _open(self.directory), paths, self.bits)

    def _method(self, layer: LinearBase, prefix: str, paths: list[str]) -> Any:
        """Return how a linear layer multiplies by the weights stacked in it."""
        checkpoint = _open(self.directory)
        reason = None if self.kernels == "dense" else self._why_dense(layer, paths, checkpoint)
        if reason is not None and self.kernels == "planes":
            raise InputError(f"kernels='planes' cannot hold {prefix}: {reason}; use kernels 'auto' or 'dense'")
        if reason is not None:
            LOGGER.info_once("matquant: dense 16-bit weights, because %s", reason)
        if reason is not None or self.kernels == "dense":
            return DenseLinearMethod(checkpoint, paths, self.bits)
        return PlanesLinearMethod(checkpoint, paths, self.bits, self.max_bits)

    def _why_dense(self, layer: LinearBase, paths: list[str], checkpoint: Checkpoint) -> str | None:
        """Return why planes do not serve a layer, as half a sentence; None if they do."""
        outside = next((path for path in paths if path not in self.bits), None)
        if outside is not None:
            return f"{outside}, which vLLM stacks with others, is not quantised"
        stacked = len(getattr(layer, "output_partition_sizes", paths))
        if len(paths) not in (1, stacked):
            return f"vLLM makes {stacked} parts of {', '.join(paths)}"
        return why_dense(
            rule=checkpoint.spec.rule,
            grid=checkpoint.spec.grid,
            group=checkpoint.spec.group_size,
            columns=layer.input_size // (layer.tp_size if isinstance(layer, RowParallelLinear) else 1),
            device=current_platform.device_type,
            dtype=layer.params_dtype,
            kernels=self.kernels,
        )


class _Arrivals:
    """The stored words that vLLM passes to a layer. paths: of the weights stacked in it; bits: path -> width."""

    def __init__(self, checkpoint: Checkpoint, paths: list[str], bits: dict[str, int]) -> None:
        self.checkpoint, self.paths, self.bits = checkpoint, paths, bits
        self.missing = {path for path in paths if path in bits}

    def watch(self, layer: torch.nn.Module, load: Callable[..., None]) -> None:
        """Give the layer a parameter for words; call load(path, words, vLLM's shard) for each weight that arrives."""

        def arrive(_: Any, words: torch.Tensor, shard: str | int | None = None) -> None:
            path = self.paths[SHARDS[shard] if isinstance(shard, str) else shard or 0]
            load(path, words, [] if shard is None else [shard])
            self.missing.discard(path)

        nothing = torch.empty(0, dtype=torch.int32)
        layer.register_parameter("weight_packed", BasevLLMParameter(data=nothing, weight_loader=arrive))

    def end(self, layer: torch.nn.Module) -> None:
        """Check that every weight has arrived."""
        check_loaded(self.missing, type(layer).__name__)
        del layer.weight_packed


@register_weight_loader_v2_supported_method
class DenseLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """A float linear layer that is loaded from codes."""

    def __init__(self, checkpoint: Checkpoint, paths: list[str], bits: dict[str, int]) -> None:
        super().__init__()
        self.arrivals = _Arrivals(checkpoint, paths, bits)

    def create_weights(self, layer: Any, *sizes: Any, **options: Any) -> None:
        super().create_weights(layer, *sizes, **options)
        weight, given = layer.weight, self.arrivals

        def load(path: str, words: torch.Tensor, shard: list[Any]) -> None:
            """Slice stored words as they arrive, and load the slice as an ordinary weight."""
            dense = read_words(given.checkpoint, path, words.to(weight.device), given.bits[path], dtype=weight.dtype)
            weight.weight_loader(weight, dense, *shard)

        given.watch(layer, load)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.arrivals.end(layer)
        super().process_weights_after_loading(layer)


@register_weight_loader_v2_supported_method
class PlanesLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A linear layer whose weights stay codes, in planes. max_bits: the widest width in memory."""

    def __init__(self, checkpoint: Checkpoint, paths: list[str], bits: dict[str, int], max_bits: int) -> None:
        self.arrivals, self.max_bits = _Arrivals(checkpoint, paths, bits), max_bits
        self.own: list[int] = []
        self.sizes: list[int] = []

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **options: Any,
    ) -> None:
        """Make room for this rank's codes, and for its scales and zero-points, which vLLM's loaders cut alike."""
        spec, loader = self.arrivals.checkpoint.spec, options["weight_loader"]
        first = self.arrivals.checkpoint.nested(self.arrivals.paths[0], mapped=True)
        self.own, self.sizes = own_widths(first, max_bits=self.max_bits), list(output_partition_sizes)
        rows, groups = sum(self.sizes), input_size_per_partition // (spec.group_size or input_size_per_partition)
        codes = ModelWeightParameter(
            data=torch.empty(rows, input_size_per_partition, dtype=torch.uint8),
            input_dim=1,
            output_dim=0,
            weight_loader=loader,
        )
        values = torch.empty(rows, groups, 2 + 2 * len(self.own), dtype=torch.float32)
        if spec.group_size is None:  # a scale is for a whole row, so no rank needs others
            scales = ChannelQuantScaleParameter(data=values, output_dim=0, weight_loader=loader)
        else:
            scales = GroupQuantScaleParameter(data=values, input_dim=1, output_dim=0, weight_loader=loader)
        layer.register_parameter("codes", codes)
        layer.register_parameter("scales", scales)

        def load(path: str, words: torch.Tensor, shard: list[Any]) -> None:
            nested, found = read_codes(self.arrivals.checkpoint, path, words)
            loader(codes, found, *shard)
            loader(scales, affines(nested, max_bits=self.max_bits), *shard)

        self.arrivals.watch(layer, load)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the planes of this rank's codes, and drop the codes."""
        self.arrivals.end(layer)
        layer.parts = make_planes(
            layer.codes.data,
            layer.scales.data,
            sizes=self.sizes,
            own=self.own,
            grid=self.arrivals.checkpoint.spec.grid,
            max_bits=self.max_bits,
        )
        del layer.codes, layer.scales
        self.select(layer, self.arrivals.bits)

    def select(self, layer: Any, bits: Mapping[str, int]) -> None:
        """Set the widths of the layer in place; weights that are fused on disk have one."""
        found = [bits[path] for path in self.arrivals.paths]
        select(layer.parts, found if len(found) == len(self.sizes) else found * len(self.sizes))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = product(layer.parts, x)
        return y if bias is None else y + bias


class Widths:
    """What a worker of vLLM can do besides, with ``worker_extension_cls="matquant.integrations.vllm.Widths"``."""

    get_model: Callable[[], torch.nn.Module]  # the worker's

    def set_matquant_bits(self, bits: int = MASTER_BITS, plan: dict[str, int] | str | None = None) -> int:
        """Switch all layers to a width or plan, in place; return their number.

        Call it while no request runs, through ``LLM.collective_rpc("set_matquant_bits", args=(4,))``, and reset the
        prefix cache, whose keys and values are those of the width before. Raises InputError, before anything changes,
        for unknown widths and paths, widths that are not in memory and layers that are dense.
        """
        modules = [(layer, getattr(layer, "quant_method", None)) for layer in self.get_model().modules()]
        kinds = (DenseLinearMethod, DenseExpertsMethod)
        dense: Any = next((layer for layer, method in modules if isinstance(method, kinds)), None)
        if dense is not None:
            name = dense.layer_name if isinstance(dense, RoutedExperts) else dense.prefix
            raise InputError(
                f"the weights of {name} are dense, so that their width is fixed; "
                "start vLLM again with these bits or this plan"
            )
        layers = [(layer, method) for layer, method in modules if isinstance(method, PlanesLinearMethod)]
        for _, method in layers[:1]:
            widths = method.arrivals.checkpoint.widths(Plan.over(bits, plan))
            check_widest(widths, max_bits=method.max_bits)
        for layer, method in layers:
            method.select(layer, widths)
        return len(layers)


def register() -> None:
    """Register the plugin; vLLM calls this in each of its processes."""
    register_quantization_config(METHOD)(NestedConfig)
