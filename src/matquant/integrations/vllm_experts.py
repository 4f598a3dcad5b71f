"""vLLM's fused experts, loaded from codes: ordinary float weights of the slice, which vLLM routes and multiplies.

vLLM holds the experts of a layer in two tensors, w13 [E, 2 I, H] with gate and up and w2 [E, H, I] with down, and hands
their loader one stored matrix at a time. Each is sliced when it arrives, at the width of its path, so that a plan may
give every expert its own; memory holds one float matrix besides the model. vLLM's loader then takes this rank's part:
some inner features under tensor parallelism, some experts under expert parallelism, of which the others are not sliced.
Shapes: E experts of the rank, I inner features of the rank, H hidden features, N out and K in features of a matrix.
"""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from matquant.format.read import Checkpoint
from matquant.integrations.words import check_loaded, expert_paths, read_words
from matquant.system.errors import InputError


def paths_of(layer: RoutedExperts, prefix: str) -> dict[tuple[int, str], str]:
    """Return the paths of a layer's experts: (expert, vLLM's name of the matrix) -> path."""
    names = (layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name)
    return expert_paths(prefix, names, layer.moe_config.num_logical_experts)


def check_supported(layer: RoutedExperts, prefix: str) -> None:
    """Raise InputError for what would place experts where their numbers do not say."""
    if layer.moe_config.moe_parallel_config.enable_eplb:
        raise InputError(
            f"vLLM is to balance the experts of {prefix} (enable_eplb), which copies them; "
            "the plugin does not support that: start vLLM without it"
        )
    if layer.expert_map_manager.num_fused_shared_experts:
        raise InputError(
            f"vLLM is to fuse the shared expert into {prefix}, which the plugin does not support; "
            "start vLLM with VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0"
        )


class DenseExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """Float experts that are loaded from codes. paths: as paths_of returns them; bits: path -> width.

    Experts that the checkpoint leaves float arrive as ``w13_weight`` and ``w2_weight``, as in any model.
    """

    def __init__(
        self,
        layer: RoutedExperts,
        checkpoint: Checkpoint,
        paths: Mapping[tuple[int, str], str],
        bits: Mapping[str, int],
    ) -> None:
        super().__init__(layer.moe_config)
        self.checkpoint, self.bits = checkpoint, bits
        is_local = layer.expert_map_manager.is_local_expert
        self.paths = {key: path for key, path in paths.items() if is_local(key[0])}
        self.missing = {path for path in self.paths.values() if path in bits}

    def create_weights(self, layer: torch.nn.Module, **options: Any) -> None:
        """Make float weights, and a parameter for the stored words of each of the two."""
        super().create_weights(layer, **options)
        for name in ("w13_weight", "w2_weight"):
            words = torch.nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)
            words.weight_loader = self._loader(getattr(layer, name))  # type: ignore[attr-defined]
            layer.register_parameter(f"{name}_packed", words)

    def _loader(self, weight: torch.nn.Parameter) -> Any:
        """Return a loader that slices stored words, int32 [N, ceil(K/4)], and loads the slice into ``weight``."""

        def arrive(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            path = self.paths.get((expert_id, shard_id))
            if path is None:  # an expert of another rank
                return False if return_success else None
            words = loaded_weight.to(weight.device)
            dense = read_words(self.checkpoint, path, words, self.bits[path], dtype=weight.dtype)
            self.missing.discard(path)
            loaded: bool | None = weight.weight_loader(  # type: ignore[attr-defined]
                weight, dense, weight_name, shard_id=shard_id, expert_id=expert_id, return_success=return_success
            )
            return loaded

        return arrive

    def process_weights_after_loading(self, layer: Any) -> None:
        check_loaded(self.missing, type(layer).__name__)
        del layer.w13_weight_packed, layer.w2_weight_packed
        super().process_weights_after_loading(layer)
