"""vLLM's fused experts, loaded from codes: ordinary float weights of the slice, which vLLM routes and multiplies.

vLLM holds the experts of a layer in two tensors, w13 [E, 2 I, H] with gate and up and w2 [E, H, I] with down, and hands
their loader one stored matrix at a time. Each is sliced when it arrives, at the width of its path, so that a plan may
give every expert its own; memory holds one float matrix besides the model. vLLM's loader then takes this rank's part:
some inner features under tensor parallelism, some experts under expert parallelism, of which the others are not sliced.
gpt-oss, whose files hold all experts in one tensor, is loaded in another way: see STREAMED.
Shapes: E experts of the rank, I inner features of the rank, H hidden features, N out and K in features of a matrix.
"""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from matquant.format.read import Checkpoint
from matquant.integrations.words import EXPERT_SHARDS, check_loaded, expert_paths, place_in_turn, read_words
from matquant.system.errors import InputError

# gpt-oss in vLLM takes tensors of one expert by the name ``experts.NUMBER.NAME`` of any parameter NAME that ends in one
# of a few words. So its stored words are renamed, and its layer has a module for each of the three matrices.
STREAMED = {
    ".gate_proj.weight_packed": ".gate_proj.w13_weight_packed",
    ".up_proj.weight_packed": ".up_proj.w13_weight_packed",
    ".down_proj.weight_packed": ".down_proj.w2_weight_packed",
}


def is_streamed(layer: torch.nn.Module) -> bool:
    """Return whether a layer's experts are those of gpt-oss, with rows of gate and up in turn."""
    return type(layer).__name__ == "GptOssRoutedExperts"


def names_of(layer: RoutedExperts) -> tuple[Any, Any, Any]:
    """Return the checkpoint's names of gate, down and up, strings; that of up is None if there is none."""
    return layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name


def paths_of(layer: RoutedExperts, prefix: str) -> dict[tuple[int, str], str]:
    """Return the paths of a layer's experts: (expert, vLLM's name of the matrix) -> path."""
    return expert_paths(prefix, names_of(layer), layer.moe_config.num_logical_experts)


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

    def create_weights(self, layer: Any, **options: Any) -> None:
        """Make float weights, and parameters whose loaders take stored words."""
        super().create_weights(layer, **options)
        if not is_streamed(layer):
            self._watch(layer, layer, "w13_weight")
            self._watch(layer, layer, "w2_weight")
            return
        for shard, name in zip(EXPERT_SHARDS, names_of(layer), strict=True):
            layer.add_module(name, torch.nn.Module())
            self._watch(layer, getattr(layer, name), "w2_weight" if shard == "w2" else "w13_weight", shard)

    def _watch(self, layer: Any, holder: torch.nn.Module, tensor: str, shard: str | None = None) -> None:
        """Give ``holder`` a parameter for words, int32 [N, ceil(K/4)], whose slices go into ``tensor`` of the layer.

        shard: the matrix that the words are of, in place of the one that vLLM names.
        """

        def arrive(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = True,  # vLLM asks some loaders for None instead, which it then ignores
        ) -> bool:
            path = self.paths.get((expert_id, shard or shard_id))
            if path is None:  # an expert of another rank
                return False
            weight = getattr(layer, tensor)
            words = loaded_weight.to(weight.device)
            dense = read_words(self.checkpoint, path, words, self.bits[path], dtype=weight.dtype)
            if shard is None:
                weight.weight_loader(weight, dense, weight_name, shard_id=shard_id, expert_id=expert_id)
            else:
                local = layer.expert_map_manager.map_global_to_local(expert_id)
                place_in_turn(dense, weight.data[local], shard=shard, rank=layer.moe_config.tp_rank)
            self.missing.discard(path)
            return True

        words = torch.nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)
        words.weight_loader = arrive  # type: ignore[attr-defined]
        holder.register_parameter(f"{tensor}_packed", words)

    def process_weights_after_loading(self, layer: Any) -> None:
        check_loaded(self.missing, type(layer).__name__)
        for name in names_of(layer) if is_streamed(layer) else ("w13_weight_packed", "w2_weight_packed"):
            delattr(layer, name)
        super().process_weights_after_loading(layer)
