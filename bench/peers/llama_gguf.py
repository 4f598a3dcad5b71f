"""The start and the end of the GGUF file of a Llama or a Qwen3-MoE, for the workers whose environment has gguf."""

from pathlib import Path
from typing import Any

import gguf

ARCHITECTURES = {"llama": "llama", "qwen3_moe": "qwen3moe"}  # of transformers -> of llama.cpp


def start_gguf(file: Path, config: dict[str, Any]) -> gguf.GGUFWriter:
    """A writer that knows the shape in ``config`` (keys of a transformers config); no vocabulary, no tensors yet."""
    writer = gguf.GGUFWriter(file, ARCHITECTURES[config["model_type"]])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config.get("rope_parameters", config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    return writer


def finish_gguf(writer: gguf.GGUFWriter) -> None:
    """Write everything that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
