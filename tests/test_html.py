"""The report page: what it says, what it escapes, what it refuses, and how a real browser shows it on a phone."""

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import conftest
from matquant import cli
from matquant.core.verdict import VERDICTS
from matquant.format.contents import summarise
from matquant.format.read import manifest_sha256, open_checkpoint
from matquant.report.page import TEMPLATE, by_name, read_record, write_report
from matquant.system.errors import InputError

EVIL = "<script>alert('x')</script>&\""
SECTIONS = ("widths", "results", "pareto", "plans", "load", "model", "made", "sizes", "sensitivities", "weights")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def checkpoint(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conftest.quantize(llama, tmp_path_factory.mktemp("html") / "check<b>point", method="rtn", rule="extra")


@pytest.fixture
def inputs(checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    """Every kind of input, with hostile names wherever a file can give one."""
    plan = tmp_path / "mine<i>.json"
    plan.write_text(json.dumps({"default": 3, "bits": {UP: 8}}))
    shapes = open_checkpoint(checkpoint).shapes
    pareto, sensitivity = tmp_path / "pareto.json", tmp_path / "sensitivity.json"
    curves = {
        "search": [[2.5, 3.5, 4.5], [3.0, 2.0, 1.9]],
        EVIL: [[2.0, 4.0], [9.0, 2.1]],
        "broken": [1],
        "gaps": [[3, None, "x"], [2.5, 1, 2]],
    }
    pareto.write_text(json.dumps({"curves": curves, "reference": 1.8}))
    table = {path: {"8": 0.0, "4": 0.01 * (1 + place), "2": 1.5} for place, path in enumerate(shapes)}
    sensitivity.write_text(json.dumps({"sensitivity": table | {EVIL: {"2": 0.2, EVIL: 1.0}}}))
    task = {"metric": "acc", "metrics": {"acc": 0.4321}, "questions": 20, "fingerprint": "f"}
    record = {
        "checkpoint": manifest_sha256(checkpoint),
        "log_perplexity": {"2": 3.25, "8": 1.75, "plan": 2.125},
        "bits_per_weight": {"2": 2.5, "8": 8.5, "plan": 4.5},
        "reference": 1.7,
        "tokens": 12345,
        "context": 64,
        "plan": {"name": EVIL, "bits": dict.fromkeys(shapes, 6)},
        "tasks": {"8": {"boolq": task, EVIL: task}},
        "task_average": {"8": 0.4321},
    }
    files = {"plans": [plan], "pareto": pareto, "sensitivity": sensitivity}
    return {"records": {"evaluation": record}, **files}


@pytest.fixture
def page(checkpoint: Path, inputs: dict[str, Any], tmp_path: Path) -> Path:
    write_report(checkpoint, tmp_path / "page.html", **inputs)
    return tmp_path / "page.html"


def rows(text: str, section: str) -> list[list[str]]:
    """Cells of every table row in a section, as a reader sees them."""
    part = text.split(f'<section id="{section}"', 1)[1].split("</section>", 1)[0]
    cells = (
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", part, re.DOTALL)
    )
    return [[html.unescape(cell) for cell in row] for row in cells]


def test_the_page_has_every_section_and_needs_nothing(page: Path) -> None:
    text = page.read_text()
    assert tuple(re.findall(r'<section id="(\w+)"', text)) == SECTIONS
    for section in SECTIONS[1:]:
        assert f'href="#{section}"' in text
    assert not re.findall(r"<(?:script|link rel=.stylesheet|img|iframe)", text)
    assert not re.findall(r"(?:https?:)?//[a-z]", text.replace("<!DOCTYPE html>", "")), "something of the network"
    for picture in re.findall(r"<svg[^>]*>", text):
        assert "aria-label=" in picture or "aria-hidden" in picture


def test_sizes_are_those_of_inspect(page: Path, checkpoint: Path) -> None:
    found = {row[0]: row[1:] for row in rows(page.read_text(), "sizes")}
    summary = summarise(open_checkpoint(checkpoint))["widths"]
    for bits in (8, 6, 4, 3, 2):
        assert found[f"int{bits}"][0] == f"{summary[bits]['bits_per_weight']:.3f}"
        assert found[f"int{bits}"][3] == f"{100 * summary[bits]['overflow']:.2f} %"
    assert float(found["int2"][3].split()[0]) > 0
    assert found["mine<i>"][3] == ""
    assert float(found["int3"][0]) < float(found["mine<i>"][0]) < float(found["int8"][0])


def test_results_stand_beside_their_width(page: Path) -> None:
    header, *found = rows(page.read_text(), "results")
    names = ["width", "bits per weight", "log-perplexity", "perplexity", "boolq", EVIL, "Task Avg."]
    assert header == names
    assert found == [
        ["float", "", "1.7000", "5.474", "", "", ""],
        ["int8", "8.500", "1.7500", "5.755", "43.21", "43.21", "43.21"],
        ["int2", "2.500", "3.2500", "25.790", "", "", ""],
        [EVIL, "4.500", "2.1250", "8.373", "", "", ""],
    ]


def test_a_plan_is_a_map_of_layers_and_linears(page: Path) -> None:
    found = rows(page.read_text(), "plans")
    assert found[0] == ["layer", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert found[1:3] == [["0", "3", "3", "3"], ["1", "3", "3", "8"]]
    assert found[4:] == [["0", "6", "6", "6"], ["1", "6", "6", "6"]], "the plan of the evaluation"


def test_the_picture_holds_what_can_be_drawn(page: Path) -> None:
    text = page.read_text()
    found = rows(text, "pareto")[1:]
    assert [row[0] for row in found] == ["search"] * 3 + [EVIL] * 2 + ["gaps"]
    assert "1 point lies above 4.85" in text  # 3 nats above the best: 9.0 is outside
    assert text.count("<polyline") == 2
    assert len(re.findall(r"nats</title>", text)) == 5


def test_everything_from_files_is_escaped(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert "<b>" not in text
    assert "<i>" not in text
    assert html.escape(EVIL, quote=False).replace("'", "&#39;").replace('"', "&#34;") in text


def test_a_bare_page_leaves_sections_without_data_out(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        write_report(checkpoint, tmp_path / name, records={})
    text = (tmp_path / "one.html").read_text()
    assert re.findall(r'<section id="(\w+)"', text) == [
        "widths", "load", "model", "made", "sizes", "weights",
    ]  # fmt: skip
    assert text == (tmp_path / "two.html").read_text(), "the same checkpoint gives the same bytes"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.html", "two.html"]


def test_without_a_pareto_file_the_evaluations_are_drawn(
    checkpoint: Path, inputs: dict[str, Any], tmp_path: Path
) -> None:
    write_report(checkpoint, tmp_path / "page.html", records=inputs["records"])
    found = rows((tmp_path / "page.html").read_text(), "pareto")[1:]
    assert found == [
        ["evaluation, uniform widths", "2.500", "3.2500"],
        ["evaluation, uniform widths", "8.500", "1.7500"],
        [f"evaluation, {EVIL}", "4.500", "2.1250"],
    ]


def test_what_planning_keeps_is_read(checkpoint: Path, tmp_path: Path) -> None:
    paths = list(open_checkpoint(checkpoint).shapes)  # down, gate, up of two layers
    assert [path.split(".")[2] for path in paths] == ["0", "0", "0", "1", "1", "1"]
    measured = {
        "888888": [0.0, 2.0],
        "822888": [0.25, 2.1],  # a fused group
        "282222": [0.5, 2.2],  # several layers: no sensitivity
        "882888": [0.125, 2.1],  # smaller than the group
        "888824": [0.75, 2.3],  # two widths
        "888884": [0.0625, 2.0],
    }
    losses = [{"checkpoint_sha256": "other", "measured": {"288888": [9.0, 9.0]}}]
    losses += [{"checkpoint_sha256": manifest_sha256(checkpoint), "measured": measured}]
    kept, pareto = tmp_path / "matquant_plans.json", tmp_path / "pareto.json"
    kept.write_text(json.dumps({"format": 1, "paths": paths, "losses": losses}))
    points = [{"bits_per_weight": 4.5, "log_perplexity": 2.25, "loss": 0.1}, {"bits_per_weight": 2.5, "loss": 0.1}]
    pareto.write_text(json.dumps({"curves": {"search": points}, "baselines": {"alone": [[2.0], [3.0]]}}))
    write_report(checkpoint, tmp_path / "page.html", records={}, pareto=pareto, sensitivity=kept)
    text = (tmp_path / "page.html").read_text()
    found = {row[0]: row[1:] for row in rows(text, "sensitivities")}
    assert found.pop("layer") == ["int4", "int2"]
    assert {path: cells for path, cells in found.items() if any(cells)} == {
        paths[1]: ["", "0.25"],
        paths[2]: ["", "0.12"],
        paths[5]: ["0.062", ""],
    }
    assert rows(text, "pareto")[1:] == [["search", "4.500", "2.2500"], ["alone", "2.000", "3.0000"]]


def test_a_sliced_rule_says_what_overflow_is(llama: Path, tmp_path: Path) -> None:
    for rule, words in (("prefix", "None: rule “prefix”"), ("round", "rule “round” clamps them")):
        out = conftest.quantize(llama, tmp_path / rule, method="rtn", rule=rule)
        write_report(out, tmp_path / "page.html", records={})
        assert words in (tmp_path / "page.html").read_text()


def test_what_cannot_be_used_is_refused(checkpoint: Path, inputs: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "refused.html"

    def refused(message: str, **change: Any) -> None:
        with pytest.raises(InputError) as caught:
            write_report(checkpoint, **({"out": out} | inputs | change))
        assert str(caught.value) == message
        assert not out.exists()

    here = manifest_sha256(checkpoint)[:12]
    refused(
        f"other was measured on checkpoint 0123…, but {checkpoint} is {here}…; evaluate this checkpoint, "
        "or give the directory of the other",
        records={"other": {"checkpoint": "0123"}},
    )
    refused(f"-o {tmp_path} is a directory; use the name of an HTML or Markdown file", out=tmp_path)
    missing = tmp_path / "missing.json"
    refused(f'--pareto {missing}: no such file; give a JSON file with "curves"', pareto=missing)
    broken = tmp_path / "broken.json"
    broken.write_text("[1]")
    refused(f"--sensitivity {broken} is not an object; give a JSON file", sensitivity=broken)
    broken.write_text('{"bits": {"nowhere": 4}}')
    nearest = next(iter(open_checkpoint(checkpoint).shapes))
    with pytest.raises(InputError, match="the plan names 'nowhere', which the model does not quantise; nearest: "):
        write_report(checkpoint, out, records={}, plans=[broken])
    assert nearest
    again = tmp_path / "again" / "broken.json"
    refused(f"--plan {broken} and {again} are both called broken; rename one of them", plans=[broken, again])
    with pytest.raises(InputError, match="are both called a; rename one of them"):
        by_name([Path("x/a.json"), Path("a.json")], "--eval")


def test_a_record_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text("{")
    with pytest.raises(InputError, match=r'is not JSON .*; give a JSON file with "log_perplexity"'):
        read_record(file)
    file.write_text('{"log_perplexity": {}, "tasks": []}')
    with pytest.raises(InputError) as caught:
        read_record(file)
    assert str(caught.value) == f"--eval {file} has no object 'tasks'; give a file that matquant eval --json wrote"


def test_the_command_line_writes_a_page_without_torch(checkpoint: Path, inputs: dict[str, Any], tmp_path: Path) -> None:
    record = tmp_path / "evaluation.json"
    record.write_text(json.dumps(inputs["records"]["evaluation"]))
    code = "import sys\nfor name in ('torch', 'transformers', 'matplotlib'): sys.modules[name] = None\n"
    code += "from matquant.cli import main\nmain()"
    words = ["report", checkpoint, "-o", tmp_path / "page.html", "--eval", record, "--plan", *inputs["plans"]]
    words += ["--pareto", inputs["pareto"], "--sensitivity", inputs["sensitivity"]]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {tmp_path / 'page.html'}\n"
    write_report(checkpoint, tmp_path / "same.html", **inputs)
    assert (tmp_path / "same.html").read_text() == (tmp_path / "page.html").read_text()


def test_text_is_measured_at_every_width_and_plan(
    checkpoint: Path,
    inputs: dict[str, Any],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = tmp_path / "three.json"
    plan.write_text('{"default": 3}')
    words = ["report", checkpoint, "-o", tmp_path / "page.html", "--plan", plan, "--text", text_file]
    monkeypatch.setattr("sys.argv", ["matquant", *map(str, words), "--max-tokens", "200"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    losses = {row[0]: row[2] for row in rows((tmp_path / "page.html").read_text(), "results") if row[0] != "width"}
    assert list(losses) == ["int8", "int6", "int4", "int3", "int2", "three"]
    assert losses["three"] == losses["int3"] != losses["int2"]


# Colours and browsers -------------------------------------------------------------------------------------------------


def contrast(first: str, second: str) -> float:
    """WCAG contrast of two #rrggbb colours, 1..21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_text_can_be_read_on_its_ground() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    style = TEMPLATE.read_text()
    cells = re.findall(r"\.([whv]\d) { background: (#\w{6}); color: (#\w{6}); }", style)
    assert len(cells) == 8 + 9 + len(VERDICTS)
    for name, ground, ink in cells:
        assert contrast(ground, ink) >= 4.5, name
    roots = re.findall(r":root { (.*?)}", style, re.DOTALL)
    assert len(roots) == 3  # light, dark, print
    for root in roots:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", root))
        for name in ("ink", "quiet", "accent"):
            for ground in ("paper", "fill"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        for index in range(8):
            assert contrast(colours[f"c{index}"], colours["paper"]) >= 4.5, index


PROBE = """<script>
window.addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll *, pre *, svg *")
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5).map(e => e.outerHTML.slice(0, 80));
  const bottom = e => e ? e.getBoundingClientRect().bottom : 0;
  document.title = JSON.stringify({client: document.documentElement.clientWidth,
    picked: bottom(document.querySelector(".picked")),
    scroll: document.documentElement.scrollWidth, wide,
    sections: [...document.querySelectorAll("section")].filter(e => e.offsetHeight > 60).map(e => e.id),
    empty: [...document.querySelectorAll("main svg")].filter(e => e.getBoundingClientRect().height < 10).length});
});
</script>"""


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[str], tuple[dict[str, Any], str]]:
    """browse(page): what a page of 390 px width measures in a real browser, and the browser's console."""
    if BROWSER is None:
        pytest.skip("no chromium on the PATH; apt-get install chromium")

    def measure(text: str) -> tuple[dict[str, Any], str]:
        # a window cannot be as narrow as a phone everywhere, a frame can
        (tmp_path / "inner.html").write_text(text.replace("</body>", PROBE + "</body>"))
        frame = json.dumps((tmp_path / "inner.html").read_text()).replace("</", "<\\/")
        outer = tmp_path / "outer.html"
        outer.write_text(
            '<!DOCTYPE html><iframe style="width: 390px; height: 800px; border: 0"></iframe><script>'
            f"const frame = document.querySelector('iframe'); frame.onload = () => setTimeout(() => "
            f"document.title = frame.contentDocument.title, 0); frame.srcdoc = {frame};</script>"
        )
        command = [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", outer.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
        title = re.search(r"<title>({.*?})</title>", done.stdout)
        assert title, done.stdout[-500:]
        console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
        return json.loads(html.unescape(title[1])), console

    return measure


def test_a_phone_shows_every_section_without_scrolling_sideways(
    page: Path, browse: Callable[[str], tuple[dict[str, Any], str]]
) -> None:
    text = page.read_text()
    found, console = browse(text)
    assert console == ""
    assert found["client"] <= 390
    assert found["scroll"] == found["client"], found["wide"]
    assert found["wide"] == []
    assert found["empty"] == 0
    assert tuple(found["sections"]) == SECTIONS
    assert 0 < found["picked"] <= 844, "the recommended row is on the first screen"


def test_the_browser_test_sees_overflow_and_errors(browse: Callable[[str], tuple[dict[str, Any], str]]) -> None:
    wrong = '<!DOCTYPE html><body><p style="width: 600px">x</p><script>nothing.here()</script></body>'
    found, console = browse(wrong)
    assert found["scroll"] > found["client"]
    assert found["wide"]
    assert "nothing is not defined" in console
