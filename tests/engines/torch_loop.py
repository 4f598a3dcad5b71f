"""What the workers with torch models share."""

from typing import Any

import numpy as np
import torch


def loop(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """The greedy continuation of the prompt, and mean nats per token of the windows."""
    ids = torch.tensor([job["prompt"]])
    count = job["new_tokens"]
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
        total = []
        for window in torch.from_numpy(np.load(job["windows"])):
            logits = model(input_ids=window[None, :-1], use_cache=False).logits.float()
            total.append(torch.nn.functional.cross_entropy(logits[0], window[1:]).double().item())
    return {"tokens": found[0, ids.shape[1] :].tolist(), "log_perplexity": sum(total) / len(total)}
