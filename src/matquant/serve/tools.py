"""Tool calls: the forms in which models write them, grammars that enforce them, and a reader of streamed text.

| form | what the model writes |
|---|---|
| hermes (Qwen, Hermes) | <tool_call>{"name": ..., "arguments": {...}}</tool_call>, once for each call |
| llama3 | {"name": ..., "parameters": {...}}, perhaps after <|python_tag|>; several are separated by ; |
| mistral (to v7) | [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...] |
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matquant.serve.errors import ApiError
from matquant.serve.structured import Grammar, Grammars, is_name, lark_json, literal


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a family writes calls. opens, closes: around a call, or around the list of calls. key: of the arguments.

    listed: the calls are a JSON list. bare: a call may begin without ``opens``, at the start of the answer.
    """

    opens: str
    closes: str = ""
    key: str = "arguments"
    listed: bool = False
    bare: bool = False
    id_prefix: str = "call_"


FORMS = {
    "hermes": Form(opens="<tool_call>", closes="</tool_call>"),
    "llama3": Form(opens="<|python_tag|>", key="parameters", bare=True),
    "mistral": Form(opens="[TOOL_CALLS]", listed=True, id_prefix=""),
}
SIGNS = {"hermes": ("<tool_call>",), "mistral": ("[TOOL_CALLS]",), "llama3": ("<|python_tag|>", '"parameters"')}
ARGUMENTS = ("arguments", "parameters")
BETWEEN = " \t\r\n,;[]"


def probe(template: str | None) -> str | None:
    """Return the form that a chat template shows, None if it does not know tools."""
    if template is None or "tools" not in template:
        return None
    return next((form for form, signs in SIGNS.items() if any(sign in template for sign in signs)), None)


@dataclass(frozen=True, kw_only=True)
class Calling:
    """What a request wants of tools. only: the names that may be called. must: an answer is at least one call."""

    form: Form
    tools: Sequence[Mapping[str, Any]]
    must: bool = False
    named: bool = False
    parallel: bool = True


def read_calling(values: Mapping[str, Any], form: str | None) -> Calling | None:
    """Return what tools, tool_choice and parallel_tool_calls ask for; None if no call may come."""
    tools, choice = values["tools"] or [], values["tool_choice"]
    for tool in tools:
        _check_tool(tool)
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError("two tools have the same name; give each its own", param="tools")
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise ApiError(
            f"tool_choice={choice!r} is not valid; give none, auto, required or a function", param="tool_choice"
        )
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError("tool_choice needs tools; give some", param="tool_choice")
        return None
    if choice == "none":
        return None
    if form is None:
        raise ApiError(
            "this model's chat template does not take tools; use a model that was trained to call them, "
            "or start the server with --tool-format",
            param="tools",
        )
    wanted = _named(choice, names) if isinstance(choice, dict) else None
    return Calling(
        form=FORMS[form],
        tools=[tool for tool in tools if wanted in (None, tool["function"]["name"])],
        must=choice == "required" or wanted is not None,
        named=wanted is not None,
        parallel=values["parallel_tool_calls"] and wanted is None,
    )


def _check_tool(tool: Mapping[str, Any]) -> None:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise ApiError(
            'a tool is not {"type": "function", "function": {...}}; only functions are supported', param="tools"
        )
    if not is_name(function.get("name")):
        raise ApiError(
            f"the function name {function.get('name')!r} is not valid; use up to 64 letters, digits, _, - and .",
            param="tools",
        )
    if not isinstance(function.get("parameters") or {}, dict):
        raise ApiError(f"the parameters of {function['name']} are not an object; give a JSON schema", param="tools")


def _named(choice: Mapping[str, Any], names: Sequence[str]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or name not in names:
        raise ApiError(
            f'tool_choice is not {{"type": "function", "function": {{"name": NAME}}}} with one of {", ".join(names)}',
            param="tool_choice",
        )
    return str(name)


# ------------------------------------------------------------------------------------------------------------ grammars


def constraint(calling: Calling, grammars: Grammars) -> Grammar | None:
    """Return the constraint of an answer that must or may call tools.

    When calls are optional and a schema cannot be compiled, answers are not constrained, unless a tool is ``strict``.
    """
    try:
        return grammars.compile(_grammar(calling, grammars), param="tools")
    except ApiError:
        if calling.must or any(tool["function"].get("strict") for tool in calling.tools):
            raise
        return None


def _grammar(calling: Calling, grammars: Grammars) -> str:
    form = calling.form
    token = grammars.special(form.opens)
    opens = literal(form.opens) if token is None else f"<[{token}]>"
    rules = ["%llguidance {}"]
    for number, tool in enumerate(calling.tools):
        function = tool["function"]
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        head = f'{{"name": {json.dumps(function["name"])}, "{form.key}": '
        rules += [f"call_{number}: {literal(head)} arguments_{number} {literal('}')}"]
        rules += [f"arguments_{number}: {lark_json(schema, param='tools')}"]
    rules += ["call: " + " | ".join(f"call_{number}" for number in range(len(calling.tools)))]
    if form.bare:
        rules += [f"calls: call {_more('; ') if calling.parallel else ''}"]
        free = "" if calling.must else " | TEXT"
        tag = "" if token is None else f" | {opens} calls"
        return "\n".join([*rules, f"start: calls{tag}{free}", r"TEXT: /[^{](.|\n)*/"])
    if form.listed:
        rules += [f'body: "[" call {_more(", ") if calling.parallel else ""} "]"']
    else:
        rules += [f'body: "\\n" call "\\n" {literal(form.closes)}']
    several = calling.parallel and not form.listed
    if calling.must:
        more = f' ("\\n" {opens} body)*' if several else ""
        return "\n".join([*rules, f"start: {opens} body{more}"])
    rules += [r"TEXT: /(.|\n)*/", "end: TEXT", "start: tag* end"]
    if token is None:
        return "\n".join([*rules, f"trigger[lazy]: TEXT {opens}", "tag: trigger body"])
    return "\n".join([*rules, f"tag: TEXT {opens} body"])


def _more(separator: str) -> str:
    return f"({literal(separator)} call)*"


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A piece of an answer: text, or of the call ``index`` its id and name (first) or more of its arguments."""

    text: str = ""
    index: int | None = None
    id: str = ""
    name: str = ""
    arguments: str = ""


class CallReader:
    """Read streamed text: what is text, what belongs to calls. Blanks before a call are not text."""

    def __init__(self, form: Form) -> None:
        self.count = 0  # calls so far
        self.complete = 0  # calls that have ended
        self._form = form
        self._buffer = ""
        self._in_calls = False
        self._wrote = False  # text came
        self._call: _Call | None = None

    def push(self, text: str) -> list[Delta]:
        """Take more text; return what is now known."""
        self._buffer += text
        found: list[Delta] = []
        while self._buffer:
            before = (len(self._buffer), self._in_calls)
            found += self._read_calls() if self._in_calls else self._read_text()
            if (len(self._buffer), self._in_calls) == before:
                break
        return found

    def finish(self) -> list[Delta]:
        """Return what was held back, at the end of the answer."""
        if self._call is not None and self._call.index is None:
            text, self._call = self._call.raw + self._buffer, None
        else:
            text = "" if self._in_calls or (self.count and not self._buffer.strip()) else self._buffer
        self._buffer = ""
        return [Delta(text=text)] if text else []

    def _read_text(self) -> list[Delta]:
        form, buffer = self._form, self._buffer
        if form.bare and not self._wrote and buffer.lstrip().startswith("{"):
            self._buffer, self._in_calls = buffer.lstrip(), True
            return []
        place = buffer.find(form.opens)
        if place >= 0:
            text, self._buffer, self._in_calls = buffer[:place].rstrip(), buffer[place + len(form.opens) :], True
            return self._text(text)
        keep = next(
            (n for n in range(min(len(buffer), len(form.opens) - 1), 0, -1) if form.opens.startswith(buffer[-n:])), 0
        )
        safe = buffer[: len(buffer) - keep].rstrip()
        self._buffer = buffer[len(safe) :]
        return self._text(safe)

    def _text(self, text: str) -> list[Delta]:
        self._wrote = self._wrote or bool(text.strip())
        return [Delta(text=text)] if text else []

    def _read_calls(self) -> list[Delta]:
        if self._call is not None:
            return self._read_call(self._call)
        self._buffer = self._buffer.lstrip(BETWEEN)
        closes = self._form.closes
        if self._buffer.startswith("{"):
            self._call = _Call()
        elif closes and self._buffer.startswith(closes):
            self._buffer, self._in_calls = self._buffer[len(closes) :], False
        elif self._buffer and not (closes and closes.startswith(self._buffer)):
            self._in_calls = False  # not a call: text
        if self._call is not None:
            return self._read_call(self._call)
        return []

    def _read_call(self, call: "_Call") -> list[Delta]:
        used = call.push(self._buffer)
        self._buffer = self._buffer[used:]
        if call.is_other and self._form.bare and call.index is None:
            self._call, self._in_calls = None, False
            return self._text(call.raw)
        found = []
        if call.name is not None and call.index is None:
            call.index = self.count
            self.count += 1
            found += [Delta(index=call.index, id=new_id(self._form), name=call.name)]
        if call.index is not None and (more := call.take()):
            found += [Delta(index=call.index, arguments=more)]
        if call.done:
            self._call = None
            self.complete += call.index is not None
            if call.index is None:
                found += self._text(call.raw)
        return found


def new_id(form: Form) -> str:
    """Return an id for a call; Mistral's templates want nine letters."""
    return f"{form.id_prefix}{secrets.token_hex(12)}" if form.id_prefix else secrets.token_hex(5)[:9]


class _Call:
    """A JSON object {"name": ..., "arguments": {...}} read letter by letter; arguments are passed on as written."""

    def __init__(self) -> None:
        self.raw = ""
        self.name: str | None = None
        self.index: int | None = None
        self.done = self.is_other = False  # is_other: its first key is none of a call
        self._depth = 0
        self._in_string = self._escaped = False
        self._key: str | None = None  # of the value being read
        self._part = ""  # a key, or a value that is not the arguments
        self._arguments = ""  # not yet taken
        self._had_arguments = False

    def push(self, text: str) -> int:
        """Read up to the end of the object; return how many letters were read."""
        for place, letter in enumerate(text):
            self._letter(letter)
            if self.done or self.is_other:
                self.raw += text[: place + 1]
                return place + 1
        self.raw += text
        return len(text)

    def take(self) -> str:
        """Return the arguments read since the last call."""
        text, self._arguments = self._arguments, ""
        if self.done and not self._had_arguments:
            self._had_arguments, text = True, "{}"
        return text

    def _letter(self, letter: str) -> None:
        if self._in_string:
            self._add(letter)
            self._in_string = self._escaped or letter != '"'
            self._escaped = letter == "\\" and not self._escaped
            return
        if self._depth == 1 and letter in ",:}":
            self._mark(letter)
            return
        self._in_string = letter == '"'
        self._depth += (letter in "{[") - (letter in "}]")
        if letter == "{" and self._depth == 1:
            return
        if self._depth > 1 or letter in "}]" or not letter.isspace():
            self._add(letter)

    def _add(self, letter: str) -> None:
        if self._key in ARGUMENTS:
            self._arguments += letter
            self._had_arguments = True
        else:
            self._part += letter

    def _mark(self, letter: str) -> None:
        """Take , : or } of the object itself."""
        if letter == ":":
            first = self._key is None
            self._key, self._part = self._part.strip('"'), ""
            self.is_other = first and self._key not in ("name", "type", "function", *ARGUMENTS)
            return
        if self._key == "name" and self._part.startswith('"'):
            try:
                self.name = str(json.loads(self._part))
            except ValueError:
                self.name = self._part.strip('"')
        self._key, self._part = "", ""
        self.done = letter == "}"
