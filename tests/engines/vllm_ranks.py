"""Runs inside the environment of vllm.txt: vLLM's own layers and loaders as two ranks see them, one after the other.

``python vllm_ranks.py FOLDER`` reads FOLDER/job.json,

    {"model": directory, "config": {the shape of the model}, "cases": {name: overrides}, "packed": {fused: [parts]}}

and writes FOLDER/NAME.safetensors: for the first decoder layer, inputs "MODULE.x" [T, K] and outputs "MODULE.y" [T, N],
put together from both ranks as vLLM would, by gathering rows or adding parts; and FOLDER/result.json, {name: {module:
bytes in memory of each rank}} or {name: {"error": message}}.
"""

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
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear

from matquant.integrations.vllm import NestedConfig

RANKS = 2


def make(name: str, shape: dict[str, int], config: NestedConfig) -> Any:
    """One of a Llama layer's modules, as vLLM's model makes it."""
    options = {"bias": False, "quant_config": config, "params_dtype": torch.float32, "prefix": f"model.layers.0.{name}"}
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, few, size = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    if name == "self_attn.qkv_proj":
        return linear.QKVParallelLinear(hidden, size, heads, few, **options)
    if name == "self_attn.o_proj":
        return linear.RowParallelLinear(heads * size, hidden, **options)
    if name == "mlp.gate_up_proj":
        return linear.MergedColumnParallelLinear(hidden, [inner] * 2, **options)
    return linear.RowParallelLinear(inner, hidden, **options)


def load(layer: Any, name: str, model: Path, packed: dict[str, list[str]]) -> None:
    """Give a layer the stored words of its weights, as vLLM's load_weights does."""
    parent, _, last = name.rpartition(".")
    shards: list[Any] = ["q", "k", "v"] if last == "qkv_proj" else [0, 1] if last == "gate_up_proj" else [None]
    with safe_open(model / "model.safetensors", "pt") as file:
        for part, shard in zip(packed.get(last, [last]), shards, strict=True):
            words = file.get_tensor(f"model.layers.0.{parent}.{part}.weight_packed")
            target = layer.weight_packed
            target.weight_loader(target, words, *([] if shard is None else [shard]))
    layer.quant_method.process_weights_after_loading(layer)


def run(model: Path, shape: dict[str, int], asked: dict[str, Any], packed: dict[str, list[str]]) -> Any:
    """The tensors and bytes of one case."""
    config = NestedConfig.from_config(asked)
    config.maybe_update_config(str(model))
    config.packed_modules_mapping = packed
    tensors: dict[str, torch.Tensor] = {}
    bytes_: dict[str, list[int]] = {}
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        outputs: list[Any] = []
        for rank in range(RANKS):
            for module in (linear, parameter):
                module.get_tensor_model_parallel_rank = lambda rank=rank: rank
                module.get_tensor_model_parallel_world_size = lambda: RANKS
            layer = make(name, shape, config)
            load(layer, name, model, packed)
            x = torch.randn(3, layer.input_size, generator=torch.Generator().manual_seed(0))
            tensors[f"{name}.x"] = x
            if isinstance(layer, linear.RowParallelLinear):
                outputs.append(layer.quant_method.apply(layer, x.chunk(RANKS, dim=-1)[rank].contiguous()))
            else:
                outputs.append(layer.quant_method.apply(layer, x).split(layer.output_partition_sizes, dim=-1))
            kept = [*layer.parameters(), *layer.buffers()]
            bytes_.setdefault(name, []).append(sum(tensor.numel() * tensor.element_size() for tensor in kept))
        if isinstance(layer, linear.RowParallelLinear):
            tensors[f"{name}.y"] = outputs[0] + outputs[1]
        else:
            together = [torch.cat(parts, dim=-1) for parts in zip(*outputs, strict=True)]
            tensors[f"{name}.y"] = torch.cat(together, dim=-1)
    return tensors, bytes_


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    result: dict[str, Any] = {}
    with set_current_vllm_config(VllmConfig()):
        for name, case in job["cases"].items():
            try:
                tensors, result[name] = run(Path(case["model"]), job["shapes"][name], case["asked"], job["packed"])
            except ValueError as error:
                result[name] = {"error": str(error)}
                continue
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    (folder / "result.json").write_text(json.dumps(result))
