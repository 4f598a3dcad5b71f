"""Runs inside the environment of vllm.txt: the float experts that each of two ranks loads, one after the other.

``python vllm_expert_ranks.py FOLDER`` reads FOLDER/job.json,

    {"model": directory, "asked": overrides, "prefix": vLLM's name of a layer's experts, "experts": their number,
    "hidden": features, "inner": features of an expert}

and writes FOLDER/NAME-RANK.safetensors for NAME in WAYS: vLLM's bfloat16 tensors w13 and w2 before they are packed for
a kernel; and FOLDER/result.json, {"error": what is said to a way that is rejected}.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import MoEActivation, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

from matquant.integrations.vllm import NestedConfig

WAYS: dict[str, dict[str, Any]] = {
    "tensor": {"tp_size": 2},
    "expert": {"ep_size": 2, "use_ep": True},
}


def make(job: dict[str, Any], parallel: FusedMoEParallelConfig) -> RoutedExperts:
    """The experts of a layer as a rank has them, loaded from the checkpoint's shard."""
    config = NestedConfig.from_config(job["asked"])
    config.maybe_update_config(job["model"])
    manager = ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=2,
        global_num_experts=job["experts"],
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=parallel,
        placement_strategy="linear",
        enable_eplb=False,
    )
    shape = FusedMoEConfig(
        num_experts=job["experts"],
        experts_per_token=2,
        hidden_dim=job["hidden"],
        intermediate_size=job["inner"],
        num_local_experts=manager.local_num_experts,
        num_logical_experts=job["experts"],
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
    )
    layer = RoutedExperts(job["prefix"], torch.bfloat16, shape, config, manager)
    with safe_open(Path(job["model"]) / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{job['prefix']}.")]  # noqa: SIM118
        stored = [(name.removeprefix(f"{job['prefix']}."), file.get_tensor(name)) for name in names]
    for _ in layer.load_weights((name, words) for name, words in stored if name.endswith("weight_packed")):
        pass
    return layer


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    alone = FusedMoEParallelConfig.make_no_parallel()
    with set_current_vllm_config(VllmConfig()):
        for name, way in WAYS.items():
            for rank in range(2):
                place = {"tp_rank": rank} if name == "tensor" else {"ep_rank": rank}
                layer = make(job, dataclasses.replace(alone, **way, **place))
                tensors = {"w13": layer.w13_weight.data, "w2": layer.w2_weight.data}
                assert not layer.quant_method.missing
                save_file(tensors, folder / f"{name}-{rank}.safetensors")
        try:
            make(job, dataclasses.replace(alone, enable_eplb=True))
        except ValueError as error:
            (folder / "result.json").write_text(json.dumps({"error": str(error)}))
