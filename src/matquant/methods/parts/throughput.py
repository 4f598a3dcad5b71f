"""What a training step costs: floating-point operations, memory of its activations, and a GPU's peak.

Model FLOPs are those of PaLM (Chowdhery et al. 2022, App. B): 6 per token and multiplied parameter, 2 of them forward,
and 12 per token, layer, attention width and position. Recomputed activations are not counted. Model-FLOPs utilisation
(MFU) is their rate over the peak of the card.

Activation bytes were counted with torch.autograd.graph.saved_tensors_hooks on Llama models: what autograd keeps of a
decoder layer, per token, with H hidden size, Q and V sizes of queries and of keys or values, I intermediate size:

    fp32    4 (5 H + Q + 2 V + 4 I)
    bf16    8 H + 2 (6 H + Q + 2 V + 4 I), and a bf16 copy of the layer's weights
"""

from typing import Any

import torch

from matquant.format.facts import EXPERTS
from matquant.hf_torch import Model
from matquant.hf_torch.layers import decoder_layers
from matquant.options.qat import Schedule
from matquant.system import ranks

# Part of a card's name -> dense bf16 FLOP/s, from NVIDIA's data sheets. The first part that occurs counts.
PEAK_FLOP_S = {
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
GATHERED = 2  # decoder layers that several processes hold whole at a time: the one that runs, and the next
MARGIN = 1.2  # of an estimate of memory, for what allocators and kernels need


def peak_flop_s(device: torch.device) -> float:
    """Return the dense bf16 peak of a GPU in FLOP/s, 0.0 for a device that is not in the table."""
    if device.type != "cuda":
        return 0.0
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(card: str) -> float:
    """Return the dense bf16 peak of a card by its name, 0.0 if it is not in the table."""
    return next((peak for part, peak in PEAK_FLOP_S.items() if part in card), 0.0)


def step_flops(model: Model, schedule: Schedule, *, terms: int, taught: bool) -> float:
    """Return the model FLOPs of an optimiser step. terms: forward and backward passes; taught: one forward more."""
    config = model.config.get_text_config()
    active = getattr(config, "num_experts_per_tok", 0)
    experts = next((getattr(config, name) for name in EXPERTS if getattr(config, name, None)), active)
    share = active / experts if experts else 1.0
    ends = (model.get_input_embeddings().weight, getattr(model.get_output_embeddings(), "weight", None))
    multiplied = sum(
        parameter.numel() * (share if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if parameter is not ends[0] or parameter is ends[1]
    )
    attention = 12 * config.num_hidden_layers * _queries(config) * schedule.seq_len
    return float((terms + taught / 3) * (6 * multiplied + attention) * step_tokens(schedule))


def step_tokens(schedule: Schedule) -> int:
    """Return the tokens of text in an optimiser step."""
    return schedule.accumulate * schedule.batch_size * schedule.seq_len


def activation_bytes(model: Model, schedule: Schedule) -> float:
    """Return the bytes that autograd keeps for the backward pass of one batch at one width, the logits aside.

    schedule: with this process's part of the batch.
    """
    config = model.config.get_text_config()
    hidden, queries, inner = config.hidden_size, _queries(config), _intermediate(config)
    values = queries // config.num_attention_heads * getattr(config, "num_key_value_heads", config.num_attention_heads)
    per_token = 4 * (5 * hidden + queries + 2 * values + 4 * inner)
    copies = 0
    if schedule.autocast:
        per_token = 8 * hidden + 2 * (6 * hidden + queries + 2 * values + 4 * inner)
        layers = [2 * sum(p.numel() for p in layer.parameters()) for _, layer in decoder_layers(model)]
        copies = sum(layers) if ranks.count() == 1 else GATHERED * max(layers)
    return float(schedule.batch_size * schedule.seq_len * config.num_hidden_layers * per_token + copies)


def step_bytes(model: Model, schedule: Schedule, *, trained: int, teachers: int) -> float:
    """Return the memory that a step takes beside weights, masters and teacher.

    trained: elements of trained tensors, which get two moments and a gradient. teachers: sets of logits kept. Of
    several processes this is one's: ``schedule`` has its part of the batch, and ``trained`` counts its rows.
    """
    config = model.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters()) / ranks.count()
    logits = 4.0 * schedule.batch_size * schedule.seq_len * config.vocab_size * (4 + 2 * teachers)
    return MARGIN * float(12.0 * trained + 5.0 * parameters + logits + activation_bytes(model, schedule))


def why_recompute(needed_bytes: float, device: torch.device) -> str:
    """Return why activations must be recomputed on a GPU, "" if they fit in its free memory."""
    if device.type != "cuda":
        return ""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    if needed_bytes <= free_bytes:
        return ""
    return (
        f"activations are recomputed in the backward pass: with them a step needs about {needed_bytes / 1e9:.1f} GB, "
        f"and {free_bytes / 1e9:.1f} GB are free on {torch.cuda.get_device_name(device)}"
    )


def _queries(config: Any) -> int:
    """Return the size of all heads' queries of a token."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * head)


def _intermediate(config: Any) -> int:
    """Return the intermediate features of a token, those of all its experts together."""
    if getattr(config, "num_experts_per_tok", 0) and getattr(config, "moe_intermediate_size", 0):
        return int(config.moe_intermediate_size * config.num_experts_per_tok)
    return int(getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", 4 * config.hidden_size))
