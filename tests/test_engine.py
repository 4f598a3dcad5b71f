"""matquant.Engine: text in, text out, at any width, from any thread, without torch."""

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import conftest
import matquant
from cases import each
from conftest import make_tokenizer
from matquant.engine.chat import Conversation, render
from matquant.engine.sampling import BLOCK, Sampling, choose, distribution, draw
from matquant.hf.text import token_stream
from matquant.hf.vocabulary import TextStream, Vocabulary, read_vocabulary
from matquant.hf_torch.loading import load_tokenizer
from matquant.measure.likelihood import log_perplexity

REFERENCE = Path(__file__).resolve().parents[1] / "examples" / "reference"
PROMPT = "Once upon a time, there was"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, quantised."""
    out = tmp_path_factory.mktemp("engine") / "reference"
    return conftest.quantize(REFERENCE / "model", out, method="rtn", scope="linears")


@pytest.fixture(scope="module")
def engine(reference: Path) -> matquant.Engine:
    return matquant.Engine(reference, threads=1)


@pytest.fixture(scope="module")
def exact(reference: Path) -> matquant.Engine:
    return matquant.Engine(reference, threads=1, activations="float")


def changed(directory: Path, to: Path, **files: dict[str, Any] | str | None) -> Path:
    """A copy of a checkpoint with other files, and the manifest they need; None removes one."""
    shutil.copytree(directory, to)
    manifest = json.loads((to / "matquant_manifest.json").read_text())
    for name, content in ((name.replace("__", "."), content) for name, content in files.items()):
        manifest["files"].pop(name, None)
        (to / name).unlink(missing_ok=True)
        if content is not None:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            (to / name).write_bytes(data)
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (to / "matquant_manifest.json").write_text(json.dumps(manifest))
    return to


# ----------------------------------------------------------------------------------------------------------- generating


@pytest.mark.parametrize("bits", [8, 3])
def test_greedy_text_is_that_of_transformers(bits: int, reference: Path, exact: matquant.Engine) -> None:
    model, tokenizer = matquant.load(reference, bits, dtype=torch.float32, kernels="none"), load_tokenizer(reference)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    reply = exact.stream(PROMPT, bits=bits, max_tokens=24)
    text = "".join(reply)
    assert reply.ids == expected[0].tolist()[: len(reply.ids)]
    assert PROMPT + text == tokenizer.decode(reply.ids, skip_special_tokens=True)
    assert (reply.reason, reply.tokens) == ("length", 24)
    assert exact.generate(PROMPT, bits=bits, max_tokens=24) == text


def test_widths_and_plans_give_different_texts_and_switching_back_the_same(engine: matquant.Engine) -> None:
    def text(**width: Any) -> str:
        return engine.generate(PROMPT, max_tokens=30, **width)

    texts = [text(bits=8), text(bits=2), text(plan={"model.layers.0.mlp.down_proj": 2}, bits=3)]
    assert len(set(texts)) == 3
    assert [text(bits=8), text(bits=2)] == texts[:2]
    assert text() == texts[0], "without a width it is max_bits"
    plan = matquant.Plan(default=3, bits={"model.layers.0.mlp.down_proj": 2})
    assert text(plan=plan) == texts[2]


def test_sessions_at_different_widths_run_at_once_from_several_threads(engine: matquant.Engine) -> None:
    alone = {bits: engine.generate(PROMPT, bits=bits, max_tokens=40) for bits in (8, 6, 4, 3, 2)}
    found: dict[int, str] = {}

    def run(bits: int) -> None:
        found[bits] = engine.generate(PROMPT, bits=bits, max_tokens=40)

    threads = [threading.Thread(target=run, args=(bits,)) for bits in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_a_step_does_not_hold_the_interpreter_lock(engine: matquant.Engine) -> None:
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            done.wait(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        session = engine.session()
        before = ticks
        for _ in range(3):
            session.rewind(0)
            session.extend(list(range(1, 129)), engine.widths(8))  # one step of many milliseconds each
        during = ticks - before
    finally:
        done.set()
        thread.join()
    assert during > 3


def test_generation_stops_where_it_should(reference: Path, engine: matquant.Engine, tmp_path: Path) -> None:
    whole = engine.generate(PROMPT, max_tokens=30)
    word = whole.split()[5]
    reply = engine.stream(PROMPT, max_tokens=30, stop=["never said", word])
    assert "".join(reply) == whole[: whole.index(word)]
    assert reply.reason == "stop"
    third = engine.stream(PROMPT, max_tokens=3)
    assert "".join(third)
    assert third.reason == "length"
    ending = third.ids[-1]
    other = changed(reference, tmp_path / "other", generation_config__json={"eos_token_id": [ending, 4000]})
    reply = matquant.Engine(other, threads=1).stream(PROMPT, max_tokens=30)
    list(reply)
    assert reply.reason == "stop"
    assert reply.tokens <= 3
    assert ending not in reply.ids[reply.prompt_tokens :]
    near_the_end = engine.prompt_ids(PROMPT) * 72  # 504 of 512
    reply = engine.stream(near_the_end, max_tokens=100)
    list(reply)
    assert (reply.reason, len(reply.ids)) == ("length", 513)


def test_generation_config_is_followed_and_overridden(reference: Path, tmp_path: Path) -> None:
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 20, "eos_token_id": 0}
    other = matquant.Engine(changed(reference, tmp_path / "other", generation_config__json=settings), threads=1)
    texts = [other.generate(PROMPT, max_tokens=20, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    greedy = other.generate(PROMPT, max_tokens=20, temperature=0)
    assert greedy not in texts
    assert greedy == other.generate(PROMPT, max_tokens=20, top_k=1, seed=7)


@each(
    ("arguments", "message"),
    [
        ({"bits": 9}, "bits=9 is not a width; use one of 1 to 8"),
        ({"plan": {"nothing": 2}}, "the plan names 'nothing', which the model does not quantise; nearest: "),
        ({"bits": 2, "plan": matquant.Plan()}, "bits=2 and a plan with default 8 exclude each other; use one of them"),
        ({"prompt": PROMPT * 90}, "the prompt has 630 tokens, but {path} reads at most 512; shorten it"),
        ({"prompt": [1, 4096]}, "token 4096 is outside the vocabulary of 4096; use the model's own tokenizer"),
        ({"prompt": "a\udcff"}, "the text is not UTF-8 (at character 1); convert it"),
        ({"max_tokens": 0}, "max_tokens=0; give a number above 0"),
        ({"stop": ["x", ""]}, "--stop '' is empty; give a text to stop at"),
        ({"temperature": -1}, "temperature=-1; give a number at least 0"),
        ({"top_p": 0.0}, "top_p=0.0; give a number above 0 and at most 1"),
        ({"top_k": -1}, "top_k=-1; give a number an integer of at least 0"),
        ({"min_p": float("nan")}, "min_p=nan; give a number from 0 to 1"),
    ],
)
def test_what_cannot_be_generated_is_refused(arguments: dict[str, Any], message: str, engine: matquant.Engine) -> None:
    with pytest.raises(matquant.InputError) as caught:
        engine.stream(**{"prompt": PROMPT, **arguments})
    assert str(caught.value).startswith(message.format(path=engine.path))


def test_what_cannot_be_opened_is_refused(reference: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"max_bits": 0}, "bits=0 is not a width"),
        ({"activations": "bf16"}, "activations='bf16' is not known; use int8 or float"),
        ({"threads": 0}, "threads=0; give a number above 0"),
    ):
        with pytest.raises(matquant.InputError, match=message):
            matquant.Engine(reference, **options)  # type: ignore[arg-type]
    with pytest.raises(matquant.InputError, match="no such directory; give a checkpoint made by matquant quantize"):
        matquant.Engine(tmp_path / "nowhere")
    bare = changed(reference, tmp_path / "bare", tokenizer__json=None)
    without = matquant.Engine(bare, threads=1)
    assert len(list(without.score([1, 2, 3]))) == 2, "ids need no tokenizer"
    with pytest.raises(matquant.InputError, match=r"has no tokenizer\.json, which text needs"):
        without.generate("text")


def test_an_engine_with_fewer_bits_holds_less_and_refuses_more(reference: Path, engine: matquant.Engine) -> None:
    narrow = matquant.Engine(reference, max_bits=4, threads=1)
    assert narrow.generate(PROMPT, bits=2, max_tokens=9) == engine.generate(PROMPT, bits=2, max_tokens=9)
    assert narrow.generate(PROMPT, max_tokens=9) == engine.generate(PROMPT, bits=4, max_tokens=9)
    with pytest.raises(matquant.InputError) as caught:
        narrow.generate(PROMPT, bits=6)
    assert str(caught.value) == (
        "bits=6 for model.layers.0.self_attn.q_proj exceeds max_bits=4 of this engine; "
        "use fewer bits or a larger max_bits"
    )


def test_bytes_per_token_are_those_of_the_planes_that_a_width_reads(engine: matquant.Engine) -> None:
    weights = sum(w.planes.rows * w.planes.columns for w in engine.model.weights.values())
    rows = sum(w.planes.rows for w in engine.model.weights.values())
    for bits, read in ((8, 8), (7, 8), (6, 6), (5, 6), (4, 4), (3, 3), (2, 2), (1, 2)):
        found = engine.model.bytes_per_token(engine.widths(bits))
        scales = 4 if bits in (2, 3, 4, 5) else 2  # the zero-points of int8 are all equal, and one number
        assert found == weights * read // 8 + rows * scales + 4096 * 256 * 2


# ----------------------------------------------------------------------------------------------------------------- text


def test_an_empty_prompt_starts_at_the_beginning_of_sequence_or_is_refused(
    reference: Path, engine: matquant.Engine, tmp_path: Path
) -> None:
    assert engine.prompt_ids("") == [0]
    config = json.loads((reference / "config.json").read_text())
    config["bos_token_id"] = None
    other = changed(reference, tmp_path / "other", config__json=config, tokenizer_config__json=None)
    with pytest.raises(matquant.InputError, match="the prompt is empty and the model has no beginning-of-sequence"):
        matquant.Engine(other, threads=1).prompt_ids("")


def byte_vocabulary() -> Vocabulary:
    """One token per byte, id = byte."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    printable = [b for b in range(256) if chr(b) in alphabet]
    letters = {b: chr(b) for b in printable} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in printable)
    }
    tokenizer = Tokenizer(models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return Vocabulary(tokenizer=tokenizer, bos=None, adds_bos=False, special={}, chat_template=None)


def pieces(data: Sequence[int], *, stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(byte_vocabulary(), stop=stop)
    return [*(stream.push(byte) for byte in data), stream.finish()]


def test_only_whole_characters_are_streamed() -> None:
    text = "né 🐱 日本"
    found = pieces(text.encode())
    assert "".join(found) == text
    assert [piece for piece in found if piece] == list(text)


def test_bytes_that_are_no_character_do_not_hold_the_text_up() -> None:
    found = pieces([0xFF, *"🐱".encode(), *b"ab"])
    assert "".join(found) == "\ufffd🐱ab"
    assert "".join(pieces([0xFF] * 40 + [*b"end"])).endswith("end")
    assert pieces([*b"a", *"🐱".encode()[:3]]) == ["a", "", "", "", ""], "half a character at the end is dropped"


def test_stop_texts_are_found_across_tokens_and_never_shown() -> None:
    assert "".join(pieces(b"one two END three", stop=["END"])) == "one two "
    assert "".join(pieces(b"one EN two", stop=["END"])) == "one EN two", "a beginning that came to nothing is given"
    assert "".join(pieces(b"it ends EN", stop=["END"])) == "it ends EN"
    assert "".join(pieces(b"aab", stop=["ab"])) == "a"
    assert "".join(pieces(b"say b then a", stop=["a t", "b"])) == "say "
    assert "".join(pieces("ab🐱cd".encode(), stop=["🐱"])) == "ab"


def test_sentencepiece_spaces_survive_streaming(data: Path) -> None:
    vocabulary = read_vocabulary(data / "models" / "stories260K")
    ids = vocabulary.prompt("Once upon a time, Tom saw a cat.")
    assert ids[0] == vocabulary.bos == 1
    stream = TextStream(vocabulary, after=ids[:4])
    text = "".join([*(stream.push(token) for token in ids[4:]), stream.finish()])
    assert vocabulary.tokenizer.decode(ids[:4]) + text == "Once upon a time, Tom saw a cat."


def test_a_leftover_truncation_does_not_cut_prompts(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(read_vocabulary(tmp_path).prompt("longer than four")) == 16


# ------------------------------------------------------------------------------------------------------------- sampling


def transformers_distribution(logits: np.ndarray, **options: Any) -> np.ndarray:
    """The probabilities transformers draws from."""
    scores = torch.from_numpy(logits)[None].double() / options["temperature"]
    for name, warper in (
        ("top_k", transformers.TopKLogitsWarper),
        ("top_p", transformers.TopPLogitsWarper),
        ("min_p", transformers.MinPLogitsWarper),
    ):
        if name in options:
            scores = warper(options[name])(None, scores)
    probabilities: np.ndarray = scores.softmax(-1)[0].numpy()
    return probabilities


@pytest.mark.parametrize("size", [50, 5000])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.9, "min_p": 0.05}, {"top_k": 2000}],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(options: dict[str, Any], size: int) -> None:
    for seed, temperature in ((0, 0.7), (1, 1.0), (2, 3.0)):
        logits = np.random.default_rng(seed).normal(size=size).astype(np.float32) * 3
        settings = {"temperature": temperature, **options}
        ids, found = distribution(logits, Sampling(**settings))
        dense = np.zeros(size)
        dense[ids] = found
        np.testing.assert_allclose(dense, transformers_distribution(logits, **settings), rtol=1e-6, atol=1e-12)


@each("size", [1, 7, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
def test_a_draw_is_the_first_token_whose_sum_exceeds_the_number(size: int) -> None:
    """Exact weights, some of them 0, so that sums are too; the numbers lie on their bounds and between."""
    generator = np.random.default_rng(size)
    weights = generator.integers(0, 4, size).astype(np.float32)
    weights[0], weights[1:][-9:] = 1, 0  # the last ones are never drawn
    bounds = np.cumsum(weights, dtype=np.float64)
    numbers = [0.0, *((bounds[:-1] + half) / bounds[-1] for half in (0.0, 0.5)), [1 - 2**-53]]
    for number in np.concatenate([np.atleast_1d(part) for part in numbers]):
        if 0 <= number < 1:
            index = draw(weights, float(number))
            assert index == int(np.argmax(bounds > number * bounds[-1]))
            assert weights[index] > 0


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    for options in ({}, {"top_k": 3}):
        sampling = Sampling(temperature=1.0, seed=5, **options)
        generator = np.random.default_rng(5)
        draws = [choose(logits, sampling, generator) for _ in range(4000)]
        counts = np.bincount(draws, minlength=4) / 4000
        expected = np.array([0.5, 0.3, 0.15, 0.0 if options else 0.05])
        np.testing.assert_allclose(counts, expected / expected.sum(), atol=0.03)
        generator = np.random.default_rng(5)
        assert [choose(logits, sampling, generator) for _ in range(4000)] == draws


# -------------------------------------------------------------------------------------------------------------- scoring


def test_scores_are_the_log_probabilities_of_transformers(reference: Path, exact: matquant.Engine) -> None:
    text = (REFERENCE / "text" / "valid.txt").read_text()[:600]
    model = matquant.load(reference, 4, dtype=torch.float32, kernels="none")
    ids = exact.vocabulary.document(text)
    assert ids[0] == 0
    with torch.no_grad():
        expected = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1).numpy()
    found = exact.score(text, bits=4)
    np.testing.assert_allclose(found, expected[np.arange(len(ids) - 1), ids[1:]], atol=2e-4)
    np.testing.assert_array_equal(exact.score(ids, bits=4), found)
    for wrong in ([5], list(range(1, 515))):
        with pytest.raises(matquant.InputError, match="tokens; give 2 to 513 \\(the context plus one\\)"):
            exact.score(wrong)


def assert_perplexity_change(reference: Path, windows: int, bits: Sequence[int]) -> None:
    """int8 activations and an fp16 cache against exact arithmetic, log-perplexity over windows of 512."""
    tokenizer = load_tokenizer(reference)
    documents = (REFERENCE / "text" / "valid.txt").read_text().split("<|endoftext|>")
    stream = token_stream([d.strip() for d in documents if d.strip()], tokenizer)[: 512 * windows + 1]
    engine = matquant.Engine(reference, threads=1)
    model = matquant.load(reference, dtype=torch.float32, kernels="none")
    for width in bits:
        model.set_bits(width)
        expected = log_perplexity(model, stream, context=512)
        rows = [stream[i * 512 : i * 512 + 513].tolist() for i in range(windows)]
        found = -float(np.mean([engine.score(row, bits=width) for row in rows]))
        print(f"int{width}: exact {expected:.5f}, int8 activations {found:.5f}, {np.expm1(found - expected):+.3%}")
        assert abs(np.expm1(found - expected)) < 0.005


def test_int8_activations_cost_less_than_half_a_percent_of_perplexity(reference: Path) -> None:
    assert_perplexity_change(reference, 2, (8, 2))


@pytest.mark.slow
def test_int8_activations_cost_less_than_half_a_percent_of_perplexity_on_more_text(reference: Path) -> None:
    assert_perplexity_change(reference, 40, (8, 6, 4, 3, 2))


# ----------------------------------------------------------------------------------------------------------------- chat

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role not in ["system", "user", "assistant"] %}{{ raise_exception("what role is this") }}{% endif %}
<{{ message.role }}>{{ message.content | trim }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_templates_are_rendered_as_transformers_does(reference: Path, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hi <b>ü</b> "}]
    for number, template in enumerate(
        (TEMPLATE, "{% for m in messages %}{{ m | tojson }}{% if loop.last %}{% break %}{% endif %}{% endfor %}")
    ):
        directory = changed(reference, tmp_path / f"chat{number}", chat_template__jinja=template)
        expected = load_tokenizer(directory).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render(read_vocabulary(directory), messages) == expected
    config = json.loads((reference / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    old = read_vocabulary(changed(reference, tmp_path / "old", tokenizer_config__json=config))
    with pytest.raises(matquant.InputError, match=r"rejects this conversation \(what role is this\); change it"):
        render(old, [{"role": "tool", "content": "x"}])
    for hostile in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for"):
        attack = read_vocabulary(changed(reference, tmp_path / hostile[3:6], chat_template__jinja=hostile))
        with pytest.raises(matquant.InputError, match="the model's chat template rejects"):
            render(attack, messages)
    with pytest.raises(matquant.InputError, match="the model has no chat template; use matquant generate"):
        render(read_vocabulary(reference), messages)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "tokenizer_config.json"])
def test_a_reply_ends_at_the_end_token_of_any_file(
    name: str, reference: Path, engine: matquant.Engine, tmp_path: Path
) -> None:
    free = engine.stream(PROMPT, bits=4, max_tokens=12)
    shown = "".join(free)
    token = free.ids[-1]
    text = engine.vocabulary.tokenizer.id_to_token(token)
    key, end = ("eos_token", text) if name == "tokenizer_config.json" else ("eos_token_id", [token])
    found = json.loads((reference / name).read_text()) if (reference / name).is_file() else {}
    other = changed(reference, tmp_path / "other", **{name.replace(".", "__"): found | {key: end}})
    reply = matquant.Engine(other, threads=1).stream(PROMPT, bits=4, max_tokens=12)
    assert shown.startswith("".join(reply))
    assert (reply.reason, reply.ids) == ("stop", free.ids[: free.ids.index(token, free.prompt_tokens)])


def test_a_conversation_gives_tools_and_more_to_its_template(reference: Path, tmp_path: Path) -> None:
    template = "{{ messages[-1].content }}{{ tools | tojson }}{{ enable_thinking }}"
    engine = matquant.Engine(changed(reference, tmp_path / "chat", chat_template__jinja=template), threads=1)
    talk = Conversation(engine, template={"tools": [{"name": "x"}], "enable_thinking": False}, max_tokens=1)
    ids = talk.ask("Hi").ids
    assert engine.vocabulary.tokenizer.decode(ids) == 'Hi[{"name": "x"}]False'


def test_a_conversation_reads_only_what_is_new(reference: Path, tmp_path: Path) -> None:
    directory = changed(reference, tmp_path / "chat", chat_template__jinja=TEMPLATE)
    engine = matquant.Engine(directory, threads=1)
    talk = Conversation(engine, bits=4, system="A story.", max_tokens=12)
    first = talk.ask("Tell me about a cat.")
    talk.answered("".join(first))
    talk.bits = 2
    second = talk.ask("And a dog?")
    known = talk._session.match(second.ids)
    assert known > first.prompt_tokens, "the first turn and its answer are in the cache"
    talk.answered("".join(second))
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    talk.bits = 4
    fresh = Conversation(engine, bits=4, system="A story.", max_tokens=12)
    assert "".join(fresh.ask("Tell me about a cat.")) == talk.messages[2]["content"]


# ------------------------------------------------------------------------------------------------------------- no torch

TORCHLESS = """
import sys
for name in ("torch", "transformers", "accelerate", "compressed_tensors", "matplotlib"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import matquant
engine = matquant.Engine(sys.argv[1], threads=1)
print(engine.generate(sys.argv[2], bits=4, max_tokens=8))
engine.score("Once upon a time", bits=2)
"""
TORCH_FIRST = """
import sys
import torch
import matquant
torch.ones(64, 64) @ torch.ones(64, 64)
print(matquant.Engine(sys.argv[1], threads=2).generate(sys.argv[2], bits=4, max_tokens=8))
torch.ones(64, 64) @ torch.ones(64, 64)
gomp = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
assert len(gomp) == 1, gomp
"""


@pytest.mark.parametrize("code", [TORCHLESS, TORCH_FIRST], ids=["without torch", "after torch"])
def test_the_engine_runs_without_torch_and_beside_it(code: str, reference: Path, engine: matquant.Engine) -> None:
    command = [sys.executable, "-W", "error", "-c", code, str(reference), PROMPT]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == engine.generate(PROMPT, bits=4, max_tokens=8) + "\n"


def test_generated_text_is_the_same_on_every_instruction_set(reference: Path, engine: matquant.Engine) -> None:
    expected = engine.generate(PROMPT, bits=3, max_tokens=12)
    code = "import sys, matquant; engine = matquant.Engine(sys.argv[1], threads=1)"
    code += "; print(engine.generate(sys.argv[2], bits=3, max_tokens=12))"
    for isa in ("scalar", "avx2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(reference), PROMPT],
            env={**os.environ, "MATQUANT_ISA": isa},
            capture_output=True,
            text=True,
        )
        if done.returncode and "is not an instruction set of this machine" in done.stderr:
            continue
        assert done.stdout == expected + "\n", done.stderr


class Heap(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")]


def malloc_bytes() -> int:
    """Bytes that malloc has given out."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Heap
    heap = mallinfo()
    return int(heap.uordblks + heap.hblkhd)


def python_bytes() -> int:
    return tracemalloc.get_traced_memory()[0]


def bytes_per_piece(pieces: Iterator[object], held: Callable[[], int]) -> float:
    """By how much ``held`` grows with a piece, once 16 have come; the least of four stretches: others allocate too."""
    assert len(list(islice(pieces, 16))) == 16
    marks = [held()]
    for _ in range(4):
        for _ in range(16):
            next(pieces)
        marks.append(held())
    return min(after - before for before, after in pairwise(marks)) / 16


@pytest.fixture(params=["python", "malloc"])
def held(request: pytest.FixtureRequest) -> Iterator[Callable[[], int]]:
    """One counter at a time: tracemalloc's own notes come from malloc."""
    if request.param == "malloc":
        if not hasattr(ctypes.CDLL(None), "mallinfo2"):
            pytest.skip("the C library does not count its memory")
        yield malloc_bytes
        return
    tracemalloc.start()
    yield python_bytes
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("activations", "threads"),
    [("int8", 2), ("float", 1), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (("int8", 1), ("float", 2)))],
)
def test_memory_of_a_stream_grows_by_its_ids_alone(
    activations: str, threads: int, held: Callable[[], int], reference: Path
) -> None:
    engine = matquant.Engine(reference, threads=threads, activations=activations)
    plan = {path: 2 + layer % 3 for layer, path in enumerate(engine.model.weights)}
    ids_bytes = 128  # of a token: an int and a place in each of three lists, which grow by steps
    for options in ({"bits": 8}, {"bits": 3}, {"plan": plan}):
        stream = engine.stream(PROMPT, max_tokens=100, temperature=0, **options)
        assert bytes_per_piece(iter(stream), held) <= ids_bytes
    session, kept = engine.session(), []
    leaking = (kept.append(session.extend([1], engine.widths(2)).copy()) for _ in range(100))
    assert bytes_per_piece(leaking, held) > ids_bytes, "logits that are kept must be seen"


@each("temperature", [1e-320, 1e-46, 1e-40, 0.0])
def test_a_temperature_too_small_for_float32_is_greedy(temperature: float) -> None:
    logits = np.array([1.0, 3.0, 2.0, -4.0], dtype=np.float32)
    assert choose(logits, Sampling(temperature=temperature), np.random.default_rng(0)) == 1
