"""lm-evaluation-harness without torch: tasks, scores, and a nested checkpoint in the native engine as its model.

``lm_eval.py`` has the models that need torch.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from matquant.engine.engine import SCORE_VALUES, Engine
from matquant.engine.sampling import log_probabilities
from matquant.engine.session import CHUNK
from matquant.hf.text import check_ids
from matquant.system.errors import InputError

VERSION: str = lm_eval.__version__
TEMPLATES = Path(lm_eval.__file__).parent / "tasks"  # the harness's task files

Report = Callable[[int, int], None]  # answers done, total
Request = tuple[tuple[str, str], list[int], list[int]]  # texts, ids of the context, ids of the answer


class EngineLM(TemplateLM):  # type: ignore[misc]
    """The native engine as the harness's model, at one width at a time.

    Answers to one question follow each other, so only what differs from the answer before is read again.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.report: Report = lambda done, total: None
        self._widths = engine.widths()
        self._session = engine.session()

    def set_widths(self, widths: np.ndarray) -> None:
        """Serve at ``widths``, as ``Engine.widths`` returns them."""
        self._widths = widths
        self._session.rewind(0)

    @property
    def eot_token_id(self) -> int:
        """Return the token before a text without context."""
        vocabulary = self.engine.vocabulary
        token = vocabulary.bos if vocabulary.bos is not None else vocabulary.eos
        if token is None:
            raise InputError(f"{self.engine.path} has neither a beginning-of-sequence nor an end-of-sequence token")
        return token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Return the ids of a text, with the tokens that the tokenizer adds unless told otherwise.

        InputError for tokens outside the embedding.
        """
        vocabulary = self.engine.vocabulary
        if add_special_tokens is None:
            beginning = vocabulary.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not string.startswith(beginning)
        ids = vocabulary.prompt(string) if add_special_tokens else vocabulary.plain(string)
        size = self.engine.model.architecture.vocab
        check_ids(ids, vocab_size=size, text_of=vocabulary.tokenizer.id_to_token)
        return ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)  # ``report`` shows progress

    def _loglikelihood_tokens(self, requests: list[Request], **options: Any) -> list[tuple[float, bool]]:
        order = sorted(range(len(requests)), key=lambda index: requests[index][1] + requests[index][2])
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for done, index in enumerate(order):
            self.report(done, len(requests))
            _, context, answer = requests[index]
            found[index] = self._score(context, answer)
        return found

    def _score(self, context: Sequence[int], answer: Sequence[int]) -> tuple[float, bool]:
        """Return the log-probability of an answer, nats, and whether each of its tokens is the most probable one."""
        ids = [*context, *answer][-(self.engine.context + 1) :]  # too long: the end counts, as in the harness
        inputs, first = ids[:-1], len(ids) - 1 - len(answer)
        known = min(self._session.match(inputs), first)
        self._session.rewind(known)
        if known < first:
            self._session.extend(inputs[known:first], self._widths)
        total, is_greedy = 0.0, True
        size = max(1, min(CHUNK, SCORE_VALUES // self.engine.model.architecture.vocab))
        for start in range(first, len(inputs), size):
            piece = inputs[start : start + size]
            logits = self._session.extend(piece, self._widths, all_logits=True)
            targets = ids[start + 1 : start + 1 + len(piece)]
            is_greedy = is_greedy and bool((logits.argmax(axis=1) == targets).all())
            total += float(log_probabilities(logits, targets).sum())
        if not np.isfinite(total):
            raise InputError(
                f"{self.engine.path} gives logits that are not finite; --engine torch names the layer where it begins"
            )
        return total, is_greedy

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise InputError("the native engine runs tasks that choose among answers; use --engine torch for this one")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise InputError("the native engine runs tasks that choose among answers; use --engine torch for this one")


def wrap_engine(engine: Engine) -> EngineLM:
    """Wrap an engine for the harness."""
    return EngineLM(engine)


def load_task(file: Path) -> Any:
    """Load a zero-shot task from its YAML file, with its data (from the hub if the file says so)."""
    (task,) = TaskManager(include_defaults=False).load([str(file)])["tasks"].values()
    task.set_config(key="num_fewshot", value=0)
    return task


def score(model: Any, task: Any, *, limit: int | None = None) -> dict[str, Any]:
    """Return the results of one task as the harness reports them: "acc,none", "acc_stderr,none", ..., "sample_len".

    Does what ``lm_eval.simple_evaluate`` does, without its survey of the machine, which takes longer than a small task.
    """
    found = lm_eval.evaluate(lm=model, task_dict={"tasks": {task.task_name: task}}, limit=limit, log_samples=False)
    (results,) = found["results"].values()
    return dict(results)
