"""Runs inside the environment of vllm.txt: reads jobs as JSON from standard input, prints one JSON object per job.

A job is {"model": directory, "quantization_config": overrides or null, "dtype": name, "prompts": [[token ids]],
"tokens": number}; the answer has, for every prompt, the greedy token ids and their log-probabilities.
"""

import json
import os
import sys
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

from vllm import LLM, SamplingParams


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The greedy continuations of one model, or the error that it ends with."""
    config = job["quantization_config"]
    overrides = {} if config is None else {"quantization_config": config}
    try:
        model = LLM(job["model"], dtype=job["dtype"], hf_overrides=overrides, enforce_eager=True, max_model_len=128)
    except ValueError as error:
        return {"error": str(error)}
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=0, ignore_eos=True)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    found = [output.outputs[0] for output in outputs]
    return {
        "ids": [list(item.token_ids) for item in found],
        "logprobs": [
            [step[token].logprob for token, step in zip(item.token_ids, item.logprobs, strict=True)] for item in found
        ],
    }


if __name__ == "__main__":
    stdout = os.dup(1)
    os.dup2(2, 1)  # vLLM prints to standard output
    for line in sys.stdin:
        os.write(stdout, (json.dumps(run(json.loads(line))) + "\n").encode())
