"""README, docs/, help texts and strings in src/: plain English; links resolve, commands parse, pages are short."""

import ast
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cases import each
from matquant.cli.verbs import VERBS, load
from matquant.options import declared_options
from matquant.options.declare import PANELS
from matquant.options.recipes import DEFAULT, RECIPES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
WRITTEN_ELSEWHERE = {"docs/extending.md"}  # pages that other people write: a link to them may come first

# As a noun; ``--scope linears`` is a name.
LINEARS = r"\b(the|all|its|our|these|other|quantised) linears\b|\blinears (are|have|in|is|of|that|which|with)\b"

# Phrases that read as if translated, each with what to say instead.
TELLS = {
    r"\bhonest(ly)?\b": "bits per weight (all overhead included)",
    r"\bzeros? (in|at) the (centre|middle)\b|\bzeros centre\b|\btheir zeros\b": "mid-range zero-points (not stored)",
    r"\bwhole rows?\b": "per channel",
    r"\baffines? of (its|their) own\b|\bown affines?\b": "per-width scale and zero-point",
    r"\bclip of Eq\. 3\b|\breach and cent": "clipping ratio",
    r"\bguess(es|ed)? (and|or) check": "draft, verify, accept",
    r"\bof these, the fewest\b": "nucleus sampling (top-p)",
    r"\bpeak rates?\b|\bof the draws\b": "peak learning rate, random seed",
    r"\bcalibration windows\b|\bwindows of (text|[\d,]+ tokens)\b": "sequences",
    r"\b(is|are|was|were|be|been|being|and|or) refused\b|\brefus(es|al)\b": "rejected, not supported",
    r"\basked of\b|\bwhat would do\b": "say what was found and what to do",
    rf"\bwhat multiplies\b|{LINEARS}": "linear layers",
    r"\bfloat model that\b|\bbest that we\b": "float reference, dedicated baseline",
    r"\b(above|below|beneath|on) the (straight )?line\b|\bline between\b": "Pareto frontier, interpolated widths",
    r"\bmixes\b(?! of)": "mixed-precision plans",
    r"\bof (its|their|our|your|his|one's) own\b": "separate, or leave it out",
    r"\bunasked\b|\btold to\b|\bsaid openly\b|\b(is|are) said\b": "say who does it",
    r"\bthe one\b[^.\n]{0,60}\bthe other\b": "name both",
    r"\d\.\d+ ?(/ ?\d+\.\d+ ?){2,}": "a table",
}
BARE = r"^(Of|Their|These|This|Those|That)\b"  # a help text that starts so has lost its subject
TOO_MANY_FIGURES = r"(\b\d+\.\d{3,}\b.*){4}"  # in a line of prose: a table
IN_SOURCE = (r"\bsaid openly\b", r"\bunasked\b", r"\bbest that we made\b")
IN_STRINGS = (  # in string literals, docstrings and templates of src/
    r"\basked of\b",
    r"\bwas asked for\b",
    r"\b(is|are|was|were|be|been) refused\b",
    r"\brefus(es|al|ing)\b",
    r"\bhonest\b",
    r"\bof (its|their|our|one's) own\b",
    r"\bwhat would do\b",
    r"\bwhat multiplies\b",
    LINEARS,
    r"\bis said\b",
    r"\btold to\b",
    r"\bzeros? (in|at) the (centre|middle)\b",
    r"\bcalibration windows\b|\bwindows of\b",
)


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Line number and line of everything but code and link targets."""
    fenced = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)


def tells(text: str) -> list[str]:
    """The tells of a page, each with its line and what to say instead."""
    found = []
    lines = list(prose(text))
    for pattern, better in TELLS.items():
        found += [
            f"line {number}: {match[0]!r}; say: {better}"
            for number, line in lines
            for match in re.finditer(pattern, line, flags=re.IGNORECASE)
        ]
    for number, line in lines:
        if not line.startswith("|") and re.search(TOO_MANY_FIGURES, line):
            found.append(f"line {number}: four figures in a line of prose; say: a table")
    return found


@each("name", NAMES)
def test_pages_have_no_tells(name: str) -> None:
    assert tells((ROOT / name).read_text()) == []


def test_tells_are_found_and_innocent_text_is_not() -> None:
    for text in ("honest bits", "zeros in the centre", "a rate of its own", "is refused", "1.2/3.4/5.6", "The linears"):
        assert tells(text), text
    for text in (
        "the center of a bin",
        "stored zeros",
        "one of 8/4/2",
        "a mix of widths",
        "on its own",
        "`of its own`",
    ):
        assert text == "`of its own`" or tells(text) == [], text


# ---------------------------------------------------------------------------------------------------------------- help


def help_texts() -> list[tuple[str, str]]:
    """Where a help text is and what it says: every verb, its arguments and options."""
    found = [(verb, line) for verb, (*_, line) in VERBS.items()]
    found += [(option.flags, option.declared.help) for option, _ in declared_options()]
    for verb in VERBS:
        found += [(f"{verb} {parameter.name}", parameter.help or "") for parameter in load(verb).params]
    return found


def test_help_is_a_sentence_or_a_noun_phrase() -> None:
    for where, text in help_texts():
        assert text, where
        assert text.endswith("."), f"{where}: {text!r}"
        assert not re.search(BARE, text), f"{where}: {text!r}"
        assert tells(text) == [], f"{where}: {text!r}"


def test_the_first_panel_is_short() -> None:
    basics = [parameter for parameter in load("quantize").params if parameter.rich_help_panel == PANELS[0]]
    assert len(basics) <= 8, [parameter.name for parameter in basics]


def test_source_has_none_of_the_worst_phrases() -> None:
    for file in sorted((ROOT / "src").rglob("*.py")):
        for pattern in IN_SOURCE:
            assert not re.search(pattern, file.read_text()), f"{file.relative_to(ROOT)}: {pattern}"


def strings(source: str) -> Iterator[tuple[int, str]]:
    """Line number and text of every string literal, docstrings and the fixed parts of f-strings included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, re.sub(r"\s+", " ", node.value)


def test_strings_in_source_have_no_tells() -> None:
    found = []
    for file in sorted((ROOT / "src").rglob("*.py")):
        for number, text in strings(file.read_text()):
            for pattern in IN_STRINGS:
                if re.search(pattern, text, flags=re.IGNORECASE):
                    found.append(f"{file.relative_to(ROOT)}:{number}: {pattern}")
    for template in sorted((ROOT / "src").rglob("*.jinja")):
        for pattern in IN_STRINGS:
            if re.search(pattern, template.read_text(), flags=re.IGNORECASE):
                found.append(f"{template.relative_to(ROOT)}: {pattern}")
    assert found == []


def test_tells_in_strings_are_found_wherever_they_are() -> None:
    source = '''"""Of its\n    own."""\nx = f"{1} is refused"\n# is refused: only a comment\n'''
    found = [text for _, text in strings(source) if any(re.search(p, text, re.IGNORECASE) for p in IN_STRINGS)]
    assert len(found) == 2


# --------------------------------------------------------------------------------------------------------------- links


def links(text: str) -> list[str]:
    """Targets of Markdown links and pictures outside code."""
    without_code = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", without_code)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.M), flags=re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


@each("name", NAMES)
def test_relative_links_resolve(name: str) -> None:
    page = ROOT / name
    for target in links(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        if there.relative_to(ROOT).as_posix() in WRITTEN_ELSEWHERE and not there.exists():
            continue
        assert there.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(there), f"{name}: {target} is none of {sorted(anchors(there))}"


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# The `--mix` option, twice\n```\n# no heading\n```\n## int8 & [int4](x.md)\n")
    assert anchors(page) == {"the---mix-option-twice", "int8--int4"}


@each("name", NAMES)
def test_files_named_in_a_page_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    for file in re.findall(r"(?<![\w/.-])(?:bench|experiments|docs|tests|examples|src/matquant)/[\w./-]*\w", text):
        there = ROOT / file
        assert file in WRITTEN_ELSEWHERE or there.exists() or there.with_suffix(".py").exists(), f"{name}: {file}"


# ------------------------------------------------------------------------------------------------------------ commands


def commands(text: str) -> list[str]:
    """Every ``matquant ...`` of a page: lines of code blocks, continued over \\, and inline code."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        found += [line.strip() for line in lines if re.match(r"\s*(\$ )?matquant ", line)]
    without_blocks = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found += [re.sub(r"\s+", " ", span) for span in re.findall(r"`(matquant\s[^`]+)`", without_blocks)]
    return [line.removeprefix("$ ") for line in found]


def flags(verb: str) -> set[str]:
    return {flag for parameter in load(verb).params for flag in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help",
        "-h",
    }


def check_command(line: str) -> None:
    """AssertionError for a verb that does not exist or a flag that the verb does not have."""
    words = shlex.split(line, comments=True)
    verb = words[1]
    if verb == "--help" or not re.fullmatch(r"[a-z]+", verb):
        return
    assert verb in VERBS, f"{line}: no verb {verb!r}"
    for word in words[2:]:
        flag = word.split("=")[0]
        if re.match(r"--?[a-z]", flag):
            assert flag in flags(verb), f"{line}: matquant {verb} has no {flag}"


@each("name", NAMES)
def test_commands_parse(name: str) -> None:
    for line in commands((ROOT / name).read_text()):
        check_command(line)


def test_wrong_commands_are_noticed() -> None:
    for line in ("matquant quantise MODEL -o OUT", "matquant quantize MODEL -o OUT --zeros centre"):
        with pytest.raises(AssertionError):
            check_command(line)


OTHERS = {"--hf-overrides", "--no-fused"}  # vLLM's, and what is always known


@each("name", NAMES)
def test_flags_in_running_text_exist(name: str) -> None:
    known = {flag for verb in VERBS for flag in flags(verb)} | OTHERS
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`(--[^`]+)`", text):
        for flag in re.findall(r"--[a-z][\w-]*", span):
            assert flag in known, f"{name}: `{span}`"


# ------------------------------------------------------------------------------------------------- length and generated


@each("name", ["README.md", "docs/results.md"])
def test_pages_people_read_first_are_short(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= 150


def test_every_page_is_in_the_index() -> None:
    index = links((ROOT / "docs" / "index.md").read_text())
    missing = {Path(name).name for name in NAMES if name.startswith("docs/")} - {"index.md", *index}
    assert not missing


def test_the_page_of_options_is_generated() -> None:
    module: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "make_options.py"))
    assert (ROOT / "docs" / "options.md").read_text() == module["page"](), "run: python docs/make_options.py"


def test_the_recipes_of_the_page_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "choose-a-recipe.md").read_text()
    for name, recipe in RECIPES.items():
        assert f"| `{name}`" in page
        assert f"| `{name}` | {recipe.cost} | {' | '.join(recipe.perplexity)} |" in page
    assert f"`{DEFAULT}` (default)" in page
    assert [name for name in RECIPES if f"--recipe {name}" not in page and name != DEFAULT] == []
