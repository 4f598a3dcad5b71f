"""Constrained answers: schemas, regular expressions, choices, grammars; blanks are bounded; errors name the field."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLTokenizer
from starlette.testclient import TestClient

from cases import each
from conftest import make_tokenizer
from http_service import assert_error, chat, complete, make_engine, make_service, stop_all
from matquant.hf.vocabulary import Vocabulary, read_vocabulary
from matquant.serve.app import make_app
from matquant.serve.errors import ApiError
from matquant.serve.limits import Limits
from matquant.serve.structured import BLANKS, Grammar, Grammars, grammar_of
from matquant.serve.tokens import show, token_reader

END, VOCAB = 256, 300
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "name": {"enum": ["a", "b"]}},
    "required": ["x", "name"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(make_tokenizer().backend_tokenizer.to_str(), vocab=VOCAB, ends=[END])


@pytest.fixture(scope="module")
def client(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    engine = make_engine(llama, tmp_path_factory.mktemp("serve"), context=512)
    with TestClient(make_app(make_service(engine), Limits())) as client:
        yield client
    stop_all()


def write(constraint: Grammar, *, seed: int, blanks: float = 0.0, most: int = 4000) -> str:
    """A text that the constraint allows, its tokens chosen at random; ``blanks`` is added to the logits of blanks."""
    generator, ids = np.random.default_rng(seed), []
    spaces = [ids[0] for ids in (make_tokenizer().encode(letter, add_special_tokens=False) for letter in " \n\t")]
    while not constraint.ended and len(ids) < most:
        logits = generator.gumbel(size=VOCAB).astype(np.float32)
        logits[spaces] += blanks
        constraint.mask(logits)
        token = int(logits.argmax())
        assert np.isfinite(logits[token])
        if token == END:
            break
        ids.append(token)
        constraint.accept(token)
    return str(make_tokenizer().decode(ids))


def compiled(grammars: Grammars, **fields: Any) -> Grammar:
    found = grammar_of({"response_format": None, "structured_outputs": None, **fields})
    assert found is not None
    return grammars.compile(found[0], param=found[1])


def random_schema(generator: random.Random, depth: int = 2) -> dict[str, Any]:
    kinds = ["integer", "boolean", "enum", "string", "null"] + ["object", "array"] * (2 if depth else 0)
    kind = generator.choice(kinds)
    if kind == "object":
        names = generator.sample("abcdef", generator.randint(1, 3))
        properties = {name: random_schema(generator, depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(generator, depth - 1), "maxItems": 3}
    return {
        "integer": {"type": "integer", "minimum": -5, "maximum": 50},
        "boolean": {"type": "boolean"},
        "enum": {"enum": ["red", "green", 3]},
        "string": {"type": "string", "maxLength": 5},
        "null": {"type": "null"},
    }[kind]


def assert_fits(value: Any, schema: dict[str, Any]) -> None:
    """The value is of the schema (the keywords that random_schema uses)."""
    if "enum" in schema:
        assert value in schema["enum"]
        return
    kind = {"object": dict, "array": list, "integer": int, "boolean": bool, "string": str, "null": type(None)}
    assert type(value) is kind[schema["type"]]
    if schema["type"] == "object":
        assert sorted(value) == sorted(schema["properties"])
        for name, entry in value.items():
            assert_fits(entry, schema["properties"][name])
    for entry in value if schema["type"] == "array" else ():
        assert_fits(entry, schema["items"])
    if schema["type"] == "array":
        assert len(value) <= 3
    if schema["type"] == "integer":
        assert -5 <= value <= 50
    if schema["type"] == "string":
        assert len(value) <= 5


def test_random_text_of_random_schemas_parses_and_fits(grammars: Grammars) -> None:
    generator = random.Random(0)
    for seed in range(40):
        schema = random_schema(generator)
        constraint = compiled(
            grammars, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        )
        assert_fits(json.loads(write(constraint, seed=seed)), schema)
    with pytest.raises(AssertionError):
        assert_fits({"a": 1}, {"type": "object", "properties": {"b": {"type": "integer"}}})


def test_blanks_are_bounded_where_a_model_likes_them(grammars: Grammars) -> None:
    schema = {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "minItems": 3, "maxItems": 3}
    constraint = compiled(grammars, structured_outputs={"json": schema})
    text = write(constraint, seed=1, blanks=50.0)
    longest = max(len(run) for run in re.findall(r"[ \n\t\r]*", text))
    assert 1 < longest <= BLANKS
    assert len(json.loads(text)) == 3


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ({"regex": r"[a-c]{2,4}-\d"}, r"[a-c]{2,4}-\d"),
        ({"choice": ["yes", "no (never)", "a|b", "é\n"]}, r"yes|no \(never\)|a\|b|é\n"),
        ({"grammar": 'root ::= ("a" | "b") [0-9] "!"'}, r"[ab]\d!"),
        ({"grammar": 'start: ("x" | "y") "-" /[0-9]{2}/'}, r"[xy]-\d\d"),
    ],
)
def test_other_constraints(grammars: Grammars, asked: dict[str, Any], form: str) -> None:
    constraint = compiled(grammars, structured_outputs=asked)
    texts = {write(constraint.copy(), seed=seed) for seed in range(8)}
    assert len(texts) > 1
    assert all(re.fullmatch(form, text) for text in texts), texts


def test_json_objects_may_have_a_schema(grammars: Grammars) -> None:
    free = json.loads(write(compiled(grammars, response_format={"type": "json_object"}), seed=3, most=10**5))
    assert isinstance(free, dict)
    constraint = compiled(grammars, response_format={"type": "json_object", "schema": {"const": "42"}})
    assert write(constraint, seed=1) == '"42"'


def test_a_copy_is_independent(grammars: Grammars) -> None:
    constraint = compiled(grammars, structured_outputs={"choice": ["ab", "cd"]})
    copy = constraint.copy()
    for letter in "ab":
        copy.accept(ord(letter) - ord("!"))
    assert copy.ended
    assert not constraint.ended
    with pytest.raises(ValueError, match="does not allow"):
        copy.accept(0)


@each(
    ("fields", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "give an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}}}, "objekt"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "not"),
        ({"response_format": {"type": "json_object", "schema": 3}}, "not the JSON of an object"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format has 'schema', which is not supported"),
        ({"structured_outputs": {}}, "nothing"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "regex, choice"),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs.regex cannot be used"),
        ({"structured_outputs": {"json": "{"}}, "not the JSON of an object"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a" * 300_000}}, "characters"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "exclude"),
    ],
)
def test_wrong_constraints_are_explained(grammars: Grammars, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiError, match=re.escape(words)) as caught:
        compiled(grammars, **fields)
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith(("response_format", "structured_outputs"))


def test_a_deep_schema_is_rejected(grammars: Grammars) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ApiError, match="levels"):
        compiled(grammars, structured_outputs={"json": schema})


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_its_schema(client: TestClient, stream: bool) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": True}}
    response = chat(client, response_format=asked, max_tokens=100, temperature=1, seed=1, stream=stream, n=2)
    texts = ["", ""]
    if stream:
        for line in response.text.split("\n\n"):
            for choice in json.loads(line[6:]).get("choices", []) if line.startswith("data: {") else []:
                texts[choice["index"]] += choice["delta"].get("content") or ""
    else:
        texts = [choice["message"]["content"] for choice in response.json()["choices"]]
        assert {choice["finish_reason"] for choice in response.json()["choices"]} == {"stop"}
    for text in texts:
        assert json.loads(text)["x"] in range(10)


def test_constraints_of_a_request_are_checked(client: TestClient) -> None:
    assert complete(client, structured_outputs={"choice": ["no", "yes"]}).json()["choices"][0]["text"] in ("no", "yes")
    assert_error(complete(client, structured_outputs={"regex": "(("}), 400, "structured_outputs.regex")
    assert_error(complete(client, structured_outputs={"choice": ["a"]}, min_tokens=2), 400, "min_tokens")


def test_bytes_of_tokens_are_those_of_another_reader(data: Path) -> None:
    kinds = {"byte-level": make_tokenizer().backend_tokenizer, "sentencepiece": None}
    kinds["sentencepiece"] = read_vocabulary(data / "models" / "stories260K").tokenizer
    for kind, tokenizer in kinds.items():
        vocabulary = Vocabulary(tokenizer=tokenizer, bos=None, adds_bos=False, special={}, chat_template=None)
        read, other = token_reader(vocabulary), LLTokenizer(tokenizer.to_str())
        for token in range(tokenizer.get_vocab_size()):
            if read(token) != b"\xff":  # which the other one takes for the start of a special token
                assert read(token) == other.decode_bytes([token]), (kind, token)
        assert read(10**6) == b""
    assert show(b"\xe2\x80") == "bytes:\\xe2\\x80"
    assert show("é".encode()) == "é"
