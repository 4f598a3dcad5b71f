"""The engine: one copy of a nested checkpoint in memory, any number of sessions, any width per call. Needs no torch.

    engine = matquant.Engine("OUT")
    engine.generate("Once upon a time", bits=2)
    engine.score("Once upon a time", bits=8)

A Session has its own key/value cache and workspace. The weights are shared and never copied, so sessions at different
widths can run at once from several threads (a step does not hold the interpreter lock). Results depend neither on the
number of threads nor on other sessions.

Activations: "int8" (dynamic, per token and group of 128 or 64 inputs, fp16 cache) or "float" (float32 throughout:
exactly the model that the codes define, much slower).
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matquant import _native
from matquant.core.nest import MASTER_BITS, check_bits
from matquant.core.planes import ACTIVATIONS
from matquant.core.spec import Plan
from matquant.engine.completion import Completion
from matquant.engine.decoder import Decoder, StepByStep
from matquant.engine.model import narrow, widen
from matquant.engine.pace import Pace
from matquant.engine.resident import check_change, load_within
from matquant.engine.sampling import Sampling, log_probabilities
from matquant.engine.session import CHUNK, Session
from matquant.engine.source import Source
from matquant.engine.speculation import AUTO, DRAFT_WIDTHS, LEAST_SAVING, OFF, Speculative, check_speculate, narrower
from matquant.format.facts import GENERATION
from matquant.format.manifest import side_facts
from matquant.format.read import open_checkpoint
from matquant.hf.text import check_ids
from matquant.hf.vocabulary import TextStream, Vocabulary, end_ids, read_vocabulary
from matquant.system.arguments import check_given, check_types
from matquant.system.errors import InputError, InputTypeError, check_positive
from matquant.system.threads import check_threads

SCORE_VALUES = 2**24  # logits held at once while scoring
CONTEXT_TAIL = 8  # tokens of the prompt that the text of the first new token may depend on

PlanLike = Plan | Mapping[str, int] | None


class Engine:
    """A nested checkpoint ready to decode.

    path: a checkpoint directory, perhaps with its first planes only. max_bits: keep only the planes that widths up to
    this one need; as an attribute the widest width that is in memory. threads: None for OMP_NUM_THREADS or all cores
    this process may use. activations: "int8" or "float". check_hashes, mmap: as in ``open_checkpoint``. resident: a
    budget for weights, such as "2GB", with swaps to replay (resident.py). InputError if it cannot be decoded.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        max_bits: int = MASTER_BITS,
        threads: int | None = None,
        activations: str = "int8",
        check_hashes: bool = True,
        mmap: bool = True,
        resident: str | int | None = None,
        swaps: Iterable[Sequence[int]] | None = None,
    ) -> None:
        check_types(path=path, activations=activations, check_hashes=check_hashes, mmap=mmap)
        check_bits(max_bits)
        if activations not in ACTIVATIONS:
            raise InputError(f"activations={activations!r} is not known; use {' or '.join(ACTIVATIONS)}")
        threads = check_threads(threads)
        checkpoint = open_checkpoint(path, check_hashes=check_hashes, mmap=mmap, partial=True)
        self.path = checkpoint.directory
        self.max_bits = max_bits = min(max_bits, checkpoint.max_bits)
        self.threads = threads
        self.exact = activations == "float"
        self.generation_config = side_facts(self.path, "generation_config.json", GENERATION)
        self._config = checkpoint.config
        self._start = checkpoint.config.get("bos_token_id")
        self._vocabulary: Vocabulary | None = None
        self._paces: dict[bytes, Pace] = {}  # widths -> what drafting for them costs and yields
        self.model, self.residency = load_within(resident, checkpoint, max_bits=max_bits, swaps=swaps)
        self.context = self.model.architecture.context
        self._source = Source(checkpoint, check_hashes=check_hashes)

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the tokenizer, read when text is first needed."""
        if self._vocabulary is None:
            self._vocabulary = read_vocabulary(self.path)
        return self._vocabulary

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """Return the ids at which a reply ends."""
        return end_ids(self._config, self.generation_config, self.vocabulary)

    @functools.cached_property
    def choosable(self) -> int:
        """Return the number of ids that may be chosen: those up to the tokenizer's last token. Heads may have more."""
        return self.vocabulary.reach(self.model.architecture.vocab)

    # ----------------------------------------------------------------------------------------------------- widths

    def widths(self, bits: int | None = None, plan: PlanLike = None) -> np.ndarray:
        """Return the width of every matrix of a step, uint8: ``bits`` (None: max_bits), or a plan over it."""
        if not isinstance(plan, Plan):
            check_given(plan=plan)
            plan = Plan(default=self.max_bits if bits is None else bits, bits=dict(plan or {}))
        elif bits is not None:
            raise InputError(f"bits={bits} and a plan with default {plan.default} exclude each other; use one of them")
        resolved = plan.resolve(self.model.weights, least=self.model.least)
        for path, width in resolved.items():
            if width > max(self.max_bits, self.model.least.get(path, 1)):
                raise InputError(
                    f"bits={width} for {path} exceeds max_bits={self.max_bits} of this engine; "
                    + (self._source.hint(width) or "use fewer bits or a larger max_bits")
                )
        return np.array([resolved.get(path, MASTER_BITS) for path in self.model.paths], dtype=np.uint8)

    def add_planes(self, max_bits: int = MASTER_BITS) -> int:
        """Bring the planes that widths up to ``max_bits`` need into memory; return the widest width there is now.

        For planes that arrived in the directory since, and after ``evict``. If some are not there yet, it is what the
        others serve. Sessions go on meanwhile, in any thread. InputError if a file is damaged, or the directory holds
        another checkpoint by now; then nothing changes.
        """
        check_change(max_bits, self.residency)
        with self._source.alone:
            checkpoint = self._source.open(held_bits=self.max_bits)
            reached = min(max_bits, checkpoint.max_bits)
            if reached > self.max_bits:
                self.model = widen(self.model, checkpoint, held_bits=self.max_bits, max_bits=reached)
                self.max_bits = reached
        return self.max_bits

    def evict(self, max_bits: int) -> None:
        """Give back the memory of planes that widths up to ``max_bits`` do not need; ``add_planes`` brings them back.

        Takes effect between steps. Completions at wider widths end with an InputError. Memory is in pages of 2 MiB.
        """
        check_change(max_bits, self.residency)
        with self._source.alone:
            if max_bits < self.max_bits:
                self.max_bits = max_bits
                self.model = narrow(self.model, max_bits=max_bits)

    def stepped(self, workspace: _native.Workspace) -> None:
        """Let planes of experts be exchanged now that a step with ``workspace`` has ended."""
        if self.residency is not None:
            with self._source.alone:
                self.model = self.residency.after(self.model, workspace)

    def session(self, capacity: int | None = None) -> Session:
        """Return an empty session with room for ``capacity`` tokens (None: the model's context)."""
        check_given(capacity=capacity)
        if capacity is not None:
            check_positive(capacity=capacity)
        return Session(self, capacity or self.context)

    # ------------------------------------------------------------------------------------------------- generating

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the ids of a prompt; "" becomes the beginning-of-sequence token. InputError if it is too long."""
        check_types(prompt=prompt)
        ids = self.vocabulary.prompt(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids:
            start = self.vocabulary.bos if isinstance(prompt, str) else None
            start = self._start if start is None else start
            if start is None:
                raise InputError("the prompt is empty and the model has no beginning-of-sequence token; give some text")
            ids = [start]
        self._check_ids(ids)
        if len(ids) > self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens, but {self.path} reads at most {self.context}; shorten it"
            )
        return ids

    def _check_ids(self, ids: Sequence[int]) -> None:
        check_ids(ids, vocab_size=self.model.architecture.vocab, text_of=self._token_text)

    def _token_text(self, token: int) -> str | None:
        """Return the text of a token, None if there is no such token or no tokenizer."""
        if not (self.path / "tokenizer.json").is_file():
            return None
        text: str | None = self.vocabulary.tokenizer.id_to_token(token)
        return text

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        bits: int | None = None,
        plan: PlanLike = None,
        max_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        speculate: str | int = OFF,
        session: Session | None = None,
    ) -> Completion:
        """Generate text piece by piece, whole characters only: iterate over the result.

        Sampling options that are None come from generation_config.json if it has do_sample, else decoding is greedy.
        Ends at an end-of-sequence token, a stop text (not part of the text), max_tokens or the end of the context.
        speculate: draft tokens at a narrower width, "auto", "off" or a number; the text is the same (docs/runtime.md).
        session: a session to continue, whose cache holds the start of the prompt.
        """
        check_types(max_tokens=max_tokens, stop=stop)
        check_speculate(speculate)
        check_positive(max_tokens=max_tokens)
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
        check_given(**given)
        if session is not None and (not isinstance(session, Session) or session.engine is not self):
            raise InputTypeError(
                f"session={session!r} is not a session of this engine; use one that session() returned"
            )
        ids, widths = self.prompt_ids(prompt), self.widths(bits, plan)
        sampling = Sampling.of_model(self.generation_config, **given)
        text = TextStream(self.vocabulary, after=ids[-CONTEXT_TAIL:], stop=stop)
        session = session or self.session(min(self.context, len(ids) + max_tokens))
        if speculate == OFF:
            decoder: Decoder = StepByStep(session, ids, widths=widths, sampling=sampling)
        else:
            drafts, pace = self._speculation(widths, length=None if speculate == AUTO else int(speculate))
            decoder = Speculative(
                session, ids, widths=widths, sampling=sampling, drafts=drafts, pace=pace, most=max_tokens
            )
        return Completion(ids, decoder=decoder, text=text, ends=self.ends, max_tokens=max_tokens)

    def _speculation(self, widths: np.ndarray, *, length: int | None) -> tuple[dict[str, np.ndarray], Pace]:
        """Return the narrower widths that may draft for ``widths``, by name, and what is known about them."""
        candidates = {f"int{bits}": self.widths(bits) for bits in DRAFT_WIDTHS if bits <= self.max_bits}
        read = self.model.bytes_per_token
        drafts = narrower(candidates, widths)
        share = {name: read(draft) / read(widths) for name, draft in drafts.items()}
        share = {name: part for name, part in share.items() if part <= LEAST_SAVING}
        if length is not None:
            return drafts, Pace(share, length=length)
        return drafts, self._paces.setdefault(widths.tobytes(), Pace(share))

    def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        """Return all the text that ``stream`` yields with the same options."""
        return "".join(self.stream(prompt, **options))

    # --------------------------------------------------------------------------------------------------- scoring

    def score(self, text: str | Sequence[int], *, bits: int | None = None, plan: PlanLike = None) -> np.ndarray:
        """Return the log-probability (nats, float64) of each token given the tokens before it.

        A text is a document: it begins with the beginning-of-sequence token if the tokenizer has one, which is not
        scored. Of n ids the last n - 1 are scored. InputError for fewer than two ids or more than the context plus one.
        """
        check_types(document=text)
        ids = self.vocabulary.document(text) if isinstance(text, str) else [int(token) for token in text]
        if not 2 <= len(ids) <= self.context + 1:
            raise InputError(f"cannot score {len(ids)} tokens; give 2 to {self.context + 1} (the context plus one)")
        self._check_ids(ids)
        widths = self.widths(bits, plan)
        session = self.session(len(ids) - 1)
        size = max(1, min(CHUNK, SCORE_VALUES // self.model.architecture.vocab))
        scores = []
        for start in range(0, len(ids) - 1, size):
            inputs = ids[start : min(start + size, len(ids) - 1)]
            logits = session.extend(inputs, widths, all_logits=True)
            scores.append(log_probabilities(logits, ids[start + 1 : start + 1 + len(inputs)]))
        return np.concatenate(scores)
