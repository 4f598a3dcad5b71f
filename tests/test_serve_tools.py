"""Tool calls: read from streamed text in three forms, enforced by grammars, and asked for by tool_choice."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from cases import each
from chat_templates import TEMPLATES
from conftest import make_tokenizer
from http_service import assert_error, chat, events, make_engine, make_service, stop_all
from matquant.serve.answers import Answer
from matquant.serve.app import make_app
from matquant.serve.errors import ApiError
from matquant.serve.limits import Limits
from matquant.serve.structured import Grammars
from matquant.serve.tools import FORMS, CallReader, Delta, constraint, probe, read_calling

NUMBER = {"type": "integer", "minimum": 0, "maximum": 9}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {"x": NUMBER}, "required": ["x"], "additionalProperties": False}}}
    for name in ("add", "sub.2")
]  # fmt: skip
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
)
ARGUMENTS = '{"place": "a } \\"b\\" ] {", "n": [1, {"m": 2}]}'


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(make_tokenizer().backend_tokenizer.to_str(), vocab=300, ends=[256])


@pytest.fixture
def client(llama: Path, tmp_path: Path) -> Iterator[TestClient]:
    service = make_service(make_engine(llama, tmp_path, template=TEMPLATE, context=1024), tool_form="hermes")
    with TestClient(make_app(service, Limits())) as client:
        client.app_state["service"] = service
        yield client
    stop_all()


def read(form: str, text: str, cuts: Sequence[int]) -> tuple[str, list[tuple[str, str]], list[Delta]]:
    """The text and calls of an answer that comes in pieces."""
    reader, deltas = CallReader(FORMS[form]), []
    for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
        deltas += reader.push(text[start:stop])
    deltas += reader.finish()
    answer = Answer()
    answer.add(deltas)
    return answer.text, [(c["function"]["name"], c["function"]["arguments"]) for c in answer.calls], deltas


HERMES = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
CASES: dict[str, tuple[str, str, str, list[tuple[str, str]]]] = {  # form, text, what is text, calls
    "plain text": ("hermes", "2 < 3 and <tool> {x}", "2 < 3 and <tool> {x}", []),
    "one call": ("hermes", HERMES % ARGUMENTS, "", [("f", ARGUMENTS)]),
    "text, two calls": (
        "hermes", f"Let me see.\n\n{HERMES % ARGUMENTS}\n{HERMES % '{}'}",
        "Let me see.", [("f", ARGUMENTS), ("f", "{}")],
    ),
    "arguments first": (
        "hermes", '<tool_call>{"arguments": {"a": 1}, "name":"g"}</tool_call>', "", [("g", '{"a": 1}')]
    ),
    "no arguments": ("hermes", '<tool_call>{"name": "g"}</tool_call>', "", [("g", "{}")]),
    "cut off": ("hermes", '<tool_call>{"name": "g", "arguments": {"a": 1', "", [("g", '{"a": 1')]),
    "no name": ("hermes", '<tool_call>{"id": 3}</tool_call>', '{"id": 3}', []),
    "llama": ("llama3", f'{{"name": "f", "parameters": {ARGUMENTS}}}', "", [("f", ARGUMENTS)]),
    "llama, typed, with a tag": (
        "llama3",
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a":1} }; {"name": "g", "parameters": {}}',
        "", [("f", '{"a":1}'), ("g", "{}")],
    ),
    "llama, other JSON": ("llama3", '{"answer": {"b": 4}} is it', '{"answer": {"b": 4}} is it', []),
    "llama, text": ("llama3", 'It is {"name": "f"}', 'It is {"name": "f"}', []),
    "mistral": (
        "mistral", f'[TOOL_CALLS][{{"name": "f", "arguments": {ARGUMENTS}}}, {{"name": "g", "arguments": {{}}}}]',
        "", [("f", ARGUMENTS), ("g", "{}")],
    ),
    "mistral, text": ("mistral", "[TOOL] is text ", "[TOOL] is text ", []),
}  # fmt: skip


@each("case", CASES)
def test_calls_are_read_however_the_text_is_cut(case: str) -> None:
    form, text, shown, calls = CASES[case]
    generator = random.Random(1)
    cuts = [sorted(generator.sample(range(len(text)), min(len(text), n))) for n in (0, 1, 3, 9)] + [range(1, len(text))]
    for places in cuts:
        found, found_calls, deltas = read(form, text, list(places))
        assert (found, found_calls) == (shown, calls)
        starts = [delta for delta in deltas if delta.id]
        assert [delta.index for delta in starts] == list(range(len(calls)))
        assert len({delta.id for delta in starts}) == len(calls)


def test_arguments_are_passed_on_as_they_come() -> None:
    reader = CallReader(FORMS["hermes"])
    assert reader.push('<tool_call>{"name": "f"') == []
    assert [(d.name, d.arguments) for d in reader.push(', "arguments": {"a": "lo')] == [("f", ""), ("", '{"a": "lo')]
    assert [d.arguments for d in reader.push("ng")] == ["ng"]


def test_ids_of_mistral_have_nine_letters() -> None:
    (start, *_) = read("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}]', [])[2]
    assert len(start.id) == 9
    assert start.id.isalnum()


def test_the_form_is_read_off_the_template() -> None:
    assert probe(TEMPLATES["chatml"]) is None
    assert probe("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert probe('{{ tools }} {"name": function name, "parameters": dictionary}') == "llama3"
    assert probe("{{ tools }}[TOOL_CALLS]") == "mistral"


# ------------------------------------------------------------------------------------------------------------- grammars


def calling(form: str, **fields: Any) -> Any:
    return read_calling({"tools": TOOLS, "tool_choice": None, "parallel_tool_calls": True, **fields}, form)


def write(grammars: Grammars, asked: Any, *, seed: int, opens: float) -> str:
    """A random text that the constraint allows; ``opens`` is added to the logits of the letters that open a call."""
    found = constraint(asked, grammars)
    assert found is not None
    generator, tokenizer, ids = np.random.default_rng(seed), make_tokenizer(), []
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in asked.form.opens]
    while not found.ended and len(ids) < 400:
        logits = generator.gumbel(size=300).astype(np.float32)
        logits[letters[min(len(ids), len(letters) - 1)]] += opens
        logits[256] += 3
        found.mask(logits)
        token = int(logits.argmax())
        if token == 256:
            break
        ids.append(token)
        found.accept(token)
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize("form", FORMS)
def test_required_calls_are_written_whatever_the_model_wants(grammars: Grammars, form: str) -> None:
    named = {"type": "function", "function": {"name": "sub.2"}}
    for seed in range(6):
        for choice, names in (("required", {"add", "sub.2"}), (named, {"sub.2"})):
            text, calls, _ = read(form, write(grammars, calling(form, tool_choice=choice), seed=seed, opens=0), [])
            assert text == ""
            assert calls
            assert {name for name, _ in calls} <= names
            assert all(json.loads(arguments)["x"] in range(10) for _, arguments in calls)
            assert len(calls) == 1 or choice == "required"
        single = calling(form, tool_choice="required", parallel_tool_calls=False)
        assert len(read(form, write(grammars, single, seed=seed, opens=0), [])[1]) == 1


@pytest.mark.parametrize("form", FORMS)
def test_optional_calls_are_valid_once_begun(grammars: Grammars, form: str) -> None:
    opens = 0.0 if form == "llama3" else 50.0
    texts = [write(grammars, calling(form, tool_choice="auto"), seed=seed, opens=opens) for seed in range(12)]
    calls = [read(form, text, [])[1] for text in texts]
    if form != "llama3":
        assert all(text.startswith(FORMS[form].opens) for text in texts)
        assert all(calls)
    assert all(json.loads(arguments)["x"] in range(10) for found in calls for _, arguments in found)
    free = [write(grammars, calling(form, tool_choice="auto"), seed=seed, opens=0) for seed in range(4)]
    assert any(read(form, text, [])[0] for text in free), "text is possible"


def test_schemas_that_cannot_be_enforced_matter_where_they_must_hold(grammars: Grammars) -> None:
    odd = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
    assert constraint(calling("hermes", tools=[odd]), grammars) is None
    with pytest.raises(ApiError, match="tools cannot be used"):
        constraint(calling("hermes", tools=[odd], tool_choice="required"), grammars)
    odd["function"]["strict"] = True
    with pytest.raises(ApiError, match="tools cannot be used"):
        constraint(calling("hermes", tools=[odd]), grammars)


# ------------------------------------------------------------------------------------------------------------- requests


def test_a_required_call_is_answered_and_can_be_sent_back(client: TestClient) -> None:
    body = chat(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=200).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert json.loads(call["function"]["arguments"])["x"] in range(10)
    history = [
        {"role": "user", "content": "Hi"},
        choice["message"],
        {"role": "tool", "tool_call_id": call["id"], "content": "7"},
    ]
    assert chat(client, messages=history, tools=TOOLS, max_tokens=2).status_code == 200


def test_a_streamed_call_begins_with_its_name(client: TestClient) -> None:
    asked = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "add"}}, "max_tokens": 200}
    found = [entry["choices"][0] for entry in events(chat(client, stream=True, seed=1, **asked))]
    deltas = [call for choice in found for call in choice["delta"].get("tool_calls", [])]
    assert deltas[0]["function"] == {"name": "add", "arguments": ""}
    assert deltas[0]["type"] == "function"
    assert all("id" not in delta for delta in deltas[1:])
    arguments = "".join(delta["function"]["arguments"] for delta in deltas)
    assert json.loads(arguments)["x"] in range(10)
    assert found[-1]["finish_reason"] == "stop", "a named function, as in OpenAI's API"
    whole = chat(client, seed=1, **asked).json()["choices"][0]["message"]["tool_calls"][0]["function"]
    assert whole == {"name": "add", "arguments": arguments}


def test_tools_reach_the_template_unless_none_may_be_called(client: TestClient) -> None:
    service = client.app_state["service"]
    for choice, is_there in (("none", False), ("auto", True), (None, True)):
        assert chat(client, tools=TOOLS, tool_choice=choice, max_tokens=2).status_code == 200
        prompt = service.vocabulary.decode(service.batcher.seen[-1].ids)
        assert ("sub.2" in prompt) is is_there


@each(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]}, "tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "messages[0].tool_calls"),
    ],
)  # fmt: skip
def test_wrong_tools_are_explained(client: TestClient, fields: dict[str, Any], param: str) -> None:
    assert_error(chat(client, **fields), 400, param)
