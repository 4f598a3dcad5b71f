"""lm-evaluation-harness with torch: register nested checkpoints as a model type, and wrap loaded models.

The harness does not find other packages' models, so this module is its command line with our model registered:

    python -m matquant.integrations.lm_eval run --model matquant --model_args pretrained=DIR,bits=4 --tasks arc_easy

All other options are the harness's. This file and ``harness.py`` are the only ones that import ``lm_eval`` (extra
``eval``).
"""

import sys
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from matquant.core.spec import Plan
from matquant.hf.text import check_ids
from matquant.hf_torch.loading import load_tokenizer
from matquant.hf_torch.nested_model import load
from matquant.integrations.harness import TEMPLATES, VERSION, Report, load_task, score
from matquant.system.errors import InputError

__all__ = ["TEMPLATES", "VERSION", "CheckedLM", "NestedLM", "load_task", "main", "score", "wrap"]
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CheckedLM(HFLM):  # type: ignore[misc]
    """The harness's transformers model; tokens outside the embedding raise InputError.

    report: called with the answers scored, and in total, if it is set.
    """

    report: Report | None = None
    _answers = _scored = 0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._answers, self._scored = len(requests), 0
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.report is not None)

    def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
        if self.report is not None:
            self.report(min(self._scored, self._answers), self._answers)
        self._scored += len(inps)
        return super()._model_call(inps, *arguments, **options)

    def tok_encode(self, *arguments: Any, **options: Any) -> Any:
        found = super().tok_encode(*arguments, **options)
        for ids in found if found and isinstance(found[0], list) else [found]:  # ids of one string, or of several
            self._check(ids)
        return found

    def tok_batch_encode(self, *arguments: Any, **options: Any) -> Any:
        ids, mask = super().tok_batch_encode(*arguments, **options)
        self._check(ids.flatten().tolist())
        return ids, mask

    def _check(self, ids: list[int]) -> None:
        size = self.model.config.get_text_config().vocab_size
        check_ids(ids, vocab_size=size, text_of=self.tokenizer.convert_ids_to_tokens)


@register_model("matquant")
class NestedLM(CheckedLM):
    """A nested checkpoint at ``bits`` bits, or at a plan file over them: ``pretrained=DIR,bits=4,plan=FILE``.

    kernels: as in ``matquant.load``, but ``none`` by default: dense weights, equal to the exported slice bit for bit.
    dtype: the checkpoint's by default. All other options are those of the harness's ``hf``. InputError as in ``load``.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        bits: int = 8,
        plan: str | None = None,
        kernels: str = "none",
        dtype: str = "auto",
        device: str | None = None,
        **options: Any,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "cpu"  # as in the harness's models: its command line defaults to cuda:0
        model = load(
            pretrained,
            plan=Plan.over(bits, plan),
            dtype=DTYPES[dtype],
            device=device,
            kernels=kernels,
        )
        super().__init__(pretrained=model, tokenizer=load_tokenizer(pretrained), **options)


def wrap(model: Any, tokenizer: Any, *, batch_size: int) -> Any:
    """Wrap a loaded transformers model for the harness; its width may change between tasks."""
    return CheckedLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def main() -> None:
    """Run the harness's command line; the user's mistakes end with one message and exit code 2."""
    try:
        cli_evaluate()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
