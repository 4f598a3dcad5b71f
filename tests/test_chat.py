"""Chat templates: rendered as transformers does, within limits of time and size; where a reply ends."""

import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import matquant
from chat_templates import CONVERSATIONS, DOCUMENTS, SYSTEM, TEMPLATES, TOOLS, USER
from conftest import make_tokenizer
from matquant.hf import renderer
from matquant.hf.panics import one_line
from matquant.hf.renderer import render_template
from matquant.hf.templates import render
from matquant.hf.vocabulary import Vocabulary, end_ids, read_vocabulary
from matquant.hf_torch.loading import load_tokenizer


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def ours(theirs: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    directory = tmp_path_factory.mktemp("tokenizer")
    theirs.save_pretrained(directory)
    return read_vocabulary(directory)


@pytest.fixture
def fast_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limits that a test can wait for."""
    monkeypatch.setattr(renderer, "SECONDS", 0.5)
    monkeypatch.setattr(renderer, "_pool", renderer._Pool())
    yield
    renderer._pool.close()


# ------------------------------------------------------------------------------------------- as transformers renders it


@pytest.mark.parametrize("form", TEMPLATES)
def test_templates_of_public_models_render_as_in_transformers(
    form: str, ours: Vocabulary, theirs: PreTrainedTokenizerFast
) -> None:
    rendered = set()
    for messages in CONVERSATIONS.values():
        for options in (
            {},
            {"tools": TOOLS},
            {"documents": DOCUMENTS, "enable_thinking": False},
            {"add_generation_prompt": False, "date_string": "1 May 2026", "bos_token": "<other>"},
        ):
            arguments = {"add_generation_prompt": True, "chat_template": TEMPLATES[form], **options}
            expected = theirs.apply_chat_template(messages, tokenize=False, **arguments)
            assert render(ours, messages, **arguments) == expected
            rendered.add(expected)
    assert len(rendered) > len(CONVERSATIONS), "the options change the text"


def test_a_last_message_is_left_open_as_in_transformers(ours: Vocabulary, theirs: PreTrainedTokenizerFast) -> None:
    answers: list[dict[str, Any]] = [
        {"role": "assistant", "content": "It is "},
        {"role": "assistant", "content": "So.", "reasoning_content": "Hm, "},
    ]
    for form in ("chatml", "gemma", "llama 3", "qwen 3, thinking"):
        messages = [SYSTEM, USER, answers[0]]
        arguments: dict[str, Any] = {"continue_final_message": True, "chat_template": TEMPLATES[form]}
        expected = theirs.apply_chat_template(messages, tokenize=False, **arguments)
        assert render(ours, messages, **arguments) == expected
        assert expected.rstrip().endswith("It is")
    arguments |= {"continue_final_message": "reasoning_content"}
    expected = theirs.apply_chat_template([USER, answers[1]], tokenize=False, **arguments)
    assert render(ours, [USER, answers[1]], **arguments) == expected
    with pytest.raises(matquant.InputError, match="the last message has no 'content' to continue; add some"):
        render(ours, [USER, {"role": "assistant"}], continue_final_message=True, chat_template=TEMPLATES["chatml"])
    with pytest.raises(matquant.InputError, match="drops a part of the last message"):
        render(ours, [USER], continue_final_message=True, chat_template="{% set x = messages[0].content %}")


def test_objects_reach_a_template_as_plain_data(ours: Vocabulary, theirs: PreTrainedTokenizerFast) -> None:
    class Text(str):
        secret = "attribute"

    arguments = {
        "chat_template": "{{ messages[0].content.secret }}{{ messages[0] | tojson }}{{ x }}",
        "x": Path("/etc"),
    }
    messages = [{"role": "user", "content": Text("text"), "size": (1, 2.5, True, None)}]
    assert render(ours, messages, **arguments) == theirs.apply_chat_template(messages, tokenize=False, **arguments)
    with pytest.raises(TypeError, match="tools has an entry that is not a dict; give a list of dicts"):
        render(ours, messages, chat_template="x", tools=[len])  # type: ignore[list-item]
    with pytest.raises(matquant.InputError, match="the conversation is empty; give at least one message"):
        render(ours, [], chat_template="x")


def tokenizer_with(directory: Path, files: dict[str, Any], config: dict[str, Any]) -> Path:
    """A tokenizer with more files, and more in its tokenizer_config.json."""
    make_tokenizer().save_pretrained(directory)
    written = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(written | config))
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


NAMED = [{"name": "default", "template": "a{{ bos_token }}"}, {"name": "tool_use", "template": "b{{ tools | tojson }}"}]
PLACES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "file": ({"chat_template.jinja": "file"}, {"chat_template": "config"}),
    "config": ({}, {"chat_template": "config {{ eos_token }}"}),
    "named list": ({}, {"chat_template": [*NAMED, {"name": "rag", "template": "c"}]}),
    "named files": ({"chat_template.jinja": "a", "additional_chat_templates/tool_use.jinja": "b"}, {}),
    "described tokens": (
        {"chat_template.jinja": "{{ bos_token }}|{{ eos_token }}|{{ sep_token }}|{{ image_token }}|{{ audio }}"},
        {
            "bos_token": {"content": "<b>", "lstrip": False, "special": True, "__type": "AddedToken"},
            "sep_token": "<s>",
            "image_token": "<image>",
            "extra_special_tokens": {"audio": "<audio>"},
        },
    ),
    "special_tokens_map": (
        {
            "chat_template.jinja": "{{ bos_token }}|{{ eos_token }}|{{ mask_token }}",
            "special_tokens_map.json": {"eos_token": {"content": "<e>"}, "mask_token": "<m>"},
        },
        {},
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_templates_and_special_tokens_are_read_from_the_files_that_transformers_reads(
    place: str, tmp_path: Path
) -> None:
    directory = tokenizer_with(tmp_path, *PLACES[place])
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(directory), read_vocabulary(directory)
    for tools in (None, TOOLS):
        expected = tokenizer.apply_chat_template([USER], tools=tools, tokenize=False, add_generation_prompt=True)
        assert render(vocabulary, [USER], tools=tools) == expected
    assert vocabulary.chat_template is not None


def test_templates_of_a_processor_and_without_a_default_are_read(tmp_path: Path) -> None:
    directory = tokenizer_with(tmp_path / "old", {"chat_template.json": {"chat_template": "processor"}}, {})
    assert render(read_vocabulary(directory), [USER]) == "processor"
    vocabulary = read_vocabulary(tokenizer_with(tmp_path / "named", {}, {"chat_template": NAMED[1:]}))
    assert render(vocabulary, [USER], chat_template="tool_use") == "bnull"
    with pytest.raises(
        matquant.InputError, match="none of the model's chat templates is the default; choose one of tool"
    ):
        render(vocabulary, [USER])


# ------------------------------------------------------------------------------------------------------------- limits

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"
FAILING = {
    "{{ 1 / 0 }}": "division by zero",
    "{{ '%1000000000d' % 1 }}": "needs more than",
    "{{ 'a' | center(10 ** 10) }}": "needs more than",
    "{{ 'a'.ljust(10 ** 10) }}": "needs more than",
    "{{ messages | tojson(indent=10 ** 10) }}": "needs more than",
    "{{ '{:>10000000000}'.format(1) }}": "needs more than|Too many",
    "{{ messages * 10 ** 9 }}": "needs more than",
    "{% for i in range(300) %}{{ 'x' * 100000 }}{% endfor %}": "writes more than 16,777,216 characters",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "infinite recursion",
    "{{ " + "(" * 5000 + " }}": "infinite recursion",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ namespace(__init__=1) }}": "a namespace cannot have '__init__'",
    "{{ raise_exception('one\ntwo\x1b[2J' ~ 'x' * 100000) }}": r"\(one two \[2Jx{280,300}\.\.\.\); change it$",
    "{{ raise_exception() }}": "missing 1 required",
    "{{ nothing.at.all }}": "'nothing' is undefined",
    "{% generation %}": "endgeneration",
}
ENDLESS = {
    "nested loops": LOOP,
    "doubling lists": DOUBLE.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x }}",
    "one operation": "{{ 3 ** (3 ** 20) % 10 }}",
}


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_or_grows_without_bound_is_one_line(template: str) -> None:
    began = time.perf_counter()
    with pytest.raises(matquant.InputError, match=FAILING[template]) as caught:
        render_template(template, {"messages": [dict(USER)]})
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith("the model's chat template ")
    assert time.perf_counter() - began < renderer.SECONDS


@pytest.mark.usefixtures("fast_limits")
def test_a_template_that_never_ends_is_stopped_in_any_thread() -> None:
    with ThreadPoolExecutor(len(ENDLESS)) as threads:
        jobs = [threads.submit(render_template, template, {}) for template in ENDLESS.values()]
        failures = [str(job.exception()) for job in jobs]
    expected = "the model's chat template did not finish within 0.5 s; replace the template, or use matquant generate"
    assert failures == [expected] * len(ENDLESS)
    assert render_template("still {{ x }}", {"x": "alive"}) == "still alive"


def test_renderings_from_many_threads_are_not_mixed_and_processes_are_few() -> None:
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda x: render_template("{{ x }}" * 100, {"x": x}), range(64)))
    assert texts == [str(x) * 100 for x in range(64)]
    assert len(renderer._pool._idle) <= renderer.WORKERS


def test_a_killed_renderer_is_started_again_and_ctrl_c_leaves_no_half_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    render_template("a", {})
    for worker in renderer._pool._idle:
        worker._process.kill()
        worker._process.wait()
    assert render_template("b", {}) == "b"

    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(renderer, "_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render_template("c", {})
    assert render_template("d", {}) == "d"


def test_a_turn_costs_milliseconds() -> None:
    messages = [dict(USER)] * 50
    render_template(TEMPLATES["chatml"], {"messages": messages})
    times = []
    for _ in range(5):
        began = time.perf_counter()
        render_template(TEMPLATES["chatml"], {"messages": messages})
        times.append(time.perf_counter() - began)
    assert min(times) < 0.1


def test_conversations_that_are_too_deep_or_too_long_are_one_line(
    ours: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(matquant.InputError, match="nested too deeply for a chat template; give plain lists"):
        render(ours, [{"role": "user", "content": deep}], chat_template="x")
    monkeypatch.setattr(renderer, "REQUEST_BYTES", 1000)
    with pytest.raises(matquant.InputError, match="bytes, but at most 1,000 can be rendered; shorten the conversation"):
        render(ours, [{"role": "user", "content": "x" * 1000}], chat_template="x")


def test_a_renderer_that_cannot_start_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(renderer, "_pool", renderer._Pool())
    monkeypatch.setattr("sys.executable", str(tmp_path / "none"))
    with pytest.raises(matquant.InputError, match="the process that renders chat templates cannot be started"):
        render_template("x", {})
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(matquant.InputError, match=r"chat templates did not start \(exit code 1\); check that /bin/f"):
        render_template("x", {})


def test_a_template_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    directory = tokenizer_with(tmp_path, {}, {})
    (directory / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(
        matquant.InputError, match=r"chat_template.jinja is not UTF-8 \(unexpected end of data at byte 3"
    ):
        read_vocabulary(directory)
    (directory / "chat_template.jinja").write_bytes(b"\xef\xbb\xbfwith a mark")
    assert render(read_vocabulary(directory), [USER]) == "with a mark"


# ------------------------------------------------------------------------------------------------------------- panics

DAMAGE: dict[str, dict[str, Any]] = {
    "Precompiled": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "index out of bounds": {"decoder": {"type": "Strip", "content": "a", "start": 99, "stop": 99}},
    "no entry found": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "lacks the prefix 'x' of continued words": {
        "model": {"type": "BPE", "vocab": {"a": 0, "é": 1}, "merges": [["a", "é"]], "continuing_subword_prefix": "x"}
    },
    "Encountered an unknown token": {"model": {"type": "Unigram", "unk_id": None, "vocab": [["z", -1.0]]}},
}


@pytest.mark.parametrize("panic", DAMAGE)
def test_a_panic_of_tokenizers_is_one_line(panic: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tokenizer_with(tmp_path, {}, {}) / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | DAMAGE[panic]))
    with pytest.raises(matquant.InputError, match=panic) as caught:
        read_vocabulary(tmp_path)
    assert str(caught.value).startswith(str(file))
    assert str(caught.value).endswith("; copy it again")
    assert "\n" not in str(caught.value)
    with pytest.raises(matquant.InputError, match=f"{tmp_path}.* (copy it again|repair its tokenizer files)$"):
        load_tokenizer(tmp_path)
    assert threading.active_count() > 1 or capfd.readouterr().err == "", "the panic's own report is not shown"


def test_what_others_report_meanwhile_is_passed_on_unless_an_error_replaces_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def report_and_fail() -> None:
        with one_line("fault", "advice"):
            os.write(2, b"a report\n")
            raise ValueError("broken")

    monkeypatch.setattr(threading, "active_count", lambda: 1)
    for _ in range(2):
        with one_line("fault", "advice"):
            os.write(2, b"first\n")
            with one_line("fault", "advice"):
                os.write(2, b"second\n")
            assert capfd.readouterr().err == ""
        assert capfd.readouterr().err == "first\nsecond\n"
        with pytest.raises(matquant.InputError, match=r"^fault \(broken\); advice$"):
            report_and_fail()
        assert capfd.readouterr().err == ""


def test_a_panic_while_encoding_is_one_line(tmp_path: Path) -> None:
    file = tokenizer_with(tmp_path, {}, {}) / "tokenizer.json"
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$b"}, "behavior": "Isolated", "invert": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": slow}))
    with pytest.raises(
        matquant.InputError, match=r"the tokenizer cannot encode this text .*; change the text, or copy"
    ):
        read_vocabulary(tmp_path).plain("a" * 50)


# ------------------------------------------------------------------------------------------------------ where it ends


@pytest.mark.parametrize(
    ("config", "generation", "eos", "expected"),
    [
        ({"eos_token_id": 0}, {"eos_token_id": 1}, 2, {0, 1, 2}),
        ({"eos_token_id": [0, 1]}, {}, 2, {0, 1, 2}),
        ({}, {"eos_token_id": [3, 4]}, None, {3, 4}),
        ({"eos_token_id": None}, {"eos_token_id": None}, None, set()),
        ({"text_config": {"eos_token_id": 5}}, {}, None, {5}),
    ],
)
def test_a_sequence_ends_at_every_end_token_that_any_file_names(
    config: dict[str, Any], generation: dict[str, Any], eos: int | None, expected: set[int]
) -> None:
    vocabulary = Vocabulary(tokenizer=None, bos=None, eos=eos, adds_bos=False, special={}, chat_template=None)
    assert end_ids(config, generation, vocabulary) == expected


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_end_token_of_the_tokenizer_is_read_from_either_file(name: str, described: bool, tmp_path: Path) -> None:
    directory = tokenizer_with(tmp_path, {}, {"eos_token": None})
    found = json.loads((directory / name).read_text()) if (directory / name).is_file() else {}
    found["eos_token"] = {"content": "b", "lstrip": False} if described else "b"
    (directory / name).write_text(json.dumps(found))
    vocabulary = read_vocabulary(directory)
    assert vocabulary.eos == vocabulary.tokenizer.token_to_id("b") is not None
