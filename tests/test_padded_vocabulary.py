"""Models with more logits than their tokenizer has tokens: ids without a token are never chosen, whoever asks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from starlette.testclient import TestClient

import matquant
from http_service import chat, complete, events, make_engine, make_service
from matquant.engine.chat import Conversation
from matquant.engine.sampling import Sampling, choose
from matquant.hf.vocabulary import read_vocabulary
from matquant.serve.app import make_app
from matquant.serve.batching import start
from matquant.serve.limits import Limits
from matquant.system.errors import InputError
from serving import COSTS, MODEL

TOKENS, ROWS = 257, 300  # of the tokenizer; of the head
PADDED = (280, 281)  # one of them has the largest logit everywhere
GREEDY: dict[str, Any] = {"temperature": 0}
SAMPLED: dict[str, Any] = {"temperature": 1.3, "top_p": 0.95, "seed": 3}
ALL: dict[str, Any] = {"temperature": 2.0, "seed": 4}
PROMPT = "Once upon"


@pytest.fixture(scope="module")
def engine(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> matquant.Engine:
    folder = tmp_path_factory.mktemp("padded")
    (folder / "model").mkdir()
    for file in llama.iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model" / "model.safetensors")
    direction = 50 * np.random.default_rng(0).normal(size=32).astype(np.float32)
    head = np.array(weights["lm_head.weight"])
    head[list(PADDED)] = direction, -direction
    save_file({**weights, "lm_head.weight": head}, folder / "model" / "model.safetensors", {"format": "pt"})
    return make_engine(folder / "model", folder)


@pytest.fixture(scope="module", params=["off", 7])
def client(engine: matquant.Engine, request: pytest.FixtureRequest) -> Iterator[TestClient]:
    """A server, without speculation and with drafts in every step."""
    batcher = start(engine, costs=COSTS, policy=False, speculate=request.param)
    service = make_service(engine, batcher=batcher)
    yield TestClient(make_app(service, Limits()))
    batcher.stop(0)


def expected(engine: matquant.Engine, prompt: str, *, bits: int, count: int, **options: Any) -> list[int]:
    """Ids of a plain loop over all logits, which are cut by hand; the largest is of an id without a token."""
    session, widths = engine.session(), engine.widths(bits)
    sampling, generator = Sampling(**options), np.random.default_rng(options.get("seed", 0))
    ids: list[int] = []
    logits = session.extend(engine.prompt_ids(prompt), widths)
    for _ in range(count):
        assert logits.shape == (ROWS,)
        assert logits.argmax() in PADDED
        ids.append(choose(logits[:TOKENS].copy(), sampling, generator))
        if ids[-1] in engine.ends:
            break
        logits = session.extend(ids[-1:], widths)
    return ids


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, ALL])
@pytest.mark.parametrize("speculate", ["off", 1, 7])
def test_the_engine_never_chooses_an_id_without_a_token(
    engine: matquant.Engine, options: dict[str, Any], speculate: str | int
) -> None:
    reply = engine.stream(PROMPT, bits=4, max_tokens=24, speculate=speculate, **options)
    "".join(reply)
    wanted = expected(engine, PROMPT, bits=4, count=24, **options)
    assert reply.ids[reply.prompt_tokens :] == [token for token in wanted if token not in engine.ends]


def test_a_conversation_never_chooses_an_id_without_a_token(engine: matquant.Engine) -> None:
    conversation = Conversation(engine, bits=2, max_tokens=12, **SAMPLED)
    reply = conversation.ask("Hi")
    "".join(reply)
    wanted = expected(engine, "<user>Hi</user><assistant>", bits=2, count=12, **SAMPLED)
    assert reply.ids[reply.prompt_tokens :] == [token for token in wanted if token not in engine.ends]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, ALL])
def test_the_server_gives_the_texts_of_the_engine(
    engine: matquant.Engine, client: TestClient, options: dict[str, Any]
) -> None:
    wanted = engine.generate(PROMPT, bits=4, max_tokens=16, **options)
    assert complete(client, max_tokens=16, bits=4, **options).json()["choices"][0]["text"] == wanted
    chunks = events(complete(client, max_tokens=16, bits=4, stream=True, **options))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == wanted
    talked = "".join(Conversation(engine, bits=4, max_tokens=16, **options).ask("Hi"))
    assert chat(client, max_tokens=16, bits=4, **options).json()["choices"][0]["message"]["content"] == talked
    chunks = events(chat(client, max_tokens=16, bits=4, stream=True, **options))
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == talked


@pytest.mark.parametrize("regex", ["[a-z ]{12}", "(?s:.*)"])
@pytest.mark.parametrize("options", [GREEDY, ALL])
def test_a_grammar_never_allows_an_id_without_a_token(client: TestClient, regex: str, options: dict[str, Any]) -> None:
    fields = {"structured_outputs": {"regex": regex}, "max_tokens": 12, "logprobs": 20, **options}
    found = complete(client, **fields).json()["choices"][0]
    assert len(found["text"].encode(errors="replace")) >= 1
    assert all(token for token in found["logprobs"]["tokens"])
    assert "" not in {token for top in found["logprobs"]["top_logprobs"] for token in top}


def test_ids_without_a_token_count_in_log_probabilities_and_are_not_listed(
    engine: matquant.Engine, client: TestClient
) -> None:
    ids = engine.prompt_ids(PROMPT)
    fields = {"prompt": ids, "max_tokens": 8, "logprobs": 20, "echo": True, "bits": 4, "ignore_eos": True, **GREEDY}
    found = complete(client, **fields).json()["choices"][0]["logprobs"]
    answer = expected(engine, PROMPT, bits=4, count=8)
    scores = engine.score([*ids, *answer], bits=4)
    assert len(answer) == 8
    np.testing.assert_allclose(found["token_logprobs"][1:], scores, atol=1e-5)
    assert max(found["token_logprobs"][len(ids) :]) < -1, "the others are more probable"
    assert all("" not in top for top in found["top_logprobs"][1:])
    assert all(
        logprob == max(top.values())
        for logprob, top in zip(found["token_logprobs"][len(ids) :], found["top_logprobs"][len(ids) :], strict=True)
    ), "greedy"


def test_a_bias_cannot_choose_an_id_without_a_token(engine: matquant.Engine, client: TestClient) -> None:
    bias = {str(token): 100 for token in PADDED}
    wanted = engine.generate(PROMPT, bits=8, max_tokens=8)
    fields = {"bits": 8, "frequency_penalty": 0.0, **GREEDY}
    assert complete(client, logit_bias=bias, **fields).json()["choices"][0]["text"] == wanted


def test_prompts_may_have_ids_without_a_token(engine: matquant.Engine, client: TestClient) -> None:
    prompt = [*engine.prompt_ids(PROMPT), 299, *PADDED]
    wanted = engine.generate(prompt, bits=8, max_tokens=8, speculate=7)
    fields = {"prompt": prompt, "bits": 8, "repetition_penalty": 1.0, **GREEDY}
    assert complete(client, **fields).json()["choices"][0]["text"] == wanted
    assert complete(client, prompt=[*prompt, ROWS]).status_code == 400


def test_all_ids_may_be_chosen_where_the_tokenizer_has_them_all() -> None:
    rows = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    assert read_vocabulary(MODEL).reach(rows) == rows


def test_a_tokenizer_without_tokens_of_the_model_is_an_error(engine: matquant.Engine) -> None:
    vocabulary = read_vocabulary(engine.path)
    assert [vocabulary.reach(rows) for rows in (1, TOKENS, TOKENS + 1, ROWS)] == [1, TOKENS, TOKENS, TOKENS]
    with pytest.raises(InputError, match="no token that the model knows"):
        vocabulary.reach(0)
