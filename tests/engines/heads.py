"""stories260K with heads of 32 instead of 8 features, the smallest that vLLM has CPU attention for: the same function.

Rotary embedding turns features i and i + d/2 by position * theta^(-2i/d). Old feature i of d = 8 becomes feature 4i of
d = 32, which turns at the same speed; all others are 0. Scores are divided by sqrt(32) in place of sqrt(8), so queries
are doubled.
"""

from pathlib import Path

import torch
import transformers

OLD, NEW = 8, 32


def widen(rows: torch.Tensor) -> torch.Tensor:
    """Rows [heads * OLD, K] of a projection -> [heads * NEW, K], 0 where there was no feature."""
    half, step = OLD // 2, NEW // OLD
    place = [step * (i % half) + NEW // 2 * (i // half) for i in range(OLD)]
    wide = torch.zeros(len(rows) // OLD, NEW, rows.shape[1], dtype=rows.dtype)
    wide[:, place] = rows.view(-1, OLD, rows.shape[1])
    return wide.view(-1, rows.shape[1])


def widen_heads(source: Path, target: Path) -> None:
    """Write the Llama model at ``source`` with wider heads to ``target``, tokenizer included."""
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensor = widen(tensor) * (2 if "q_proj" in name else 1)
        if name.endswith("o_proj.weight"):
            tensor = widen(tensor.T).T.contiguous()
        state[name] = tensor
    config = transformers.LlamaConfig(**{**model.config.to_dict(), "head_dim": NEW})
    wide = transformers.LlamaForCausalLM(config)
    wide.load_state_dict(state)
    wide.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(target)
