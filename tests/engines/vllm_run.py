"""Runs inside the environment of vllm.txt: reads jobs as JSON from standard input, prints one JSON object per job.

A job is {"model": directory, "quantization_config": overrides or null, "dtype": name, "prompts": [[token ids]],
"tokens": number, "switch": [{"bits": ..., "plan": ...}], "compiled": bool, "options": further arguments of LLM}; the
answer has, for every prompt, the greedy token ids and their log-probabilities, and under "switched" the same after each
switch of width, or its error.
"""

import json
import os
import sys
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

from vllm import LLM, SamplingParams

WIDTHS = "matquant.integrations.vllm.Widths"


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The greedy continuations of one model, or the error that it ends with."""
    config = job["quantization_config"]
    overrides = {} if config is None else {"quantization_config": config}
    options: dict[str, Any] = {"enforce_eager": not job.get("compiled"), "max_model_len": 128, **job.get("options", {})}
    try:
        model = LLM(job["model"], dtype=job["dtype"], hf_overrides=overrides, worker_extension_cls=WIDTHS, **options)
    except ValueError as error:
        return {"error": str(error)}
    switched: list[dict[str, Any]] = []
    answer = {**generate(model, job), "switched": switched}
    for asked in job.get("switch", []):
        try:
            layers = model.collective_rpc("set_matquant_bits", kwargs=asked)
        except ValueError as error:
            switched.append({"error": str(error)})
            continue
        model.reset_prefix_cache()
        switched.append({**generate(model, job), "layers": layers})
    return answer


def generate(model: LLM, job: dict[str, Any]) -> dict[str, Any]:
    """The greedy continuations of all prompts."""
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
