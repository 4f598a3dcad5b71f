"""The first screen of the report and a checkpoint's model card: what it is, what a width costs, which to choose."""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import conftest
import matquant
from matquant.core.verdict import level, smallest, verdict
from matquant.export import export
from matquant.format.contents import summarise
from matquant.format.describe import count_words, plain, size
from matquant.format.read import manifest_sha256, open_checkpoint
from matquant.format.seal import seal_checkpoint
from matquant.format.verify import verify_checkpoint
from matquant.report.page import write_report
from matquant.system.errors import InputError
from test_html import EVIL, rows

LOSSES = {"8": 0.01, "6": 0.05, "4": 0.2, "3": 0.9, "2": 3.0}  # nats above the reference
REFERENCE = 2.0
WORDS = ["as good as float", "slightly worse", "clearly worse", "much worse", "not usable for text"]


@pytest.fixture(scope="module")
def checkpoint(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conftest.quantize(llama, tmp_path_factory.mktemp("screen") / "tiny", method="rtn", scope="linears")


@pytest.fixture
def record(checkpoint: Path) -> dict[str, Any]:
    return {
        "checkpoint": manifest_sha256(checkpoint),
        "log_perplexity": {width: REFERENCE + loss for width, loss in LOSSES.items()},
        "bits_per_weight": dict.fromkeys(LOSSES, 5.0),
        "kld": {width: loss / 2 for width, loss in LOSSES.items()},
        "top1": {width: 1 - loss / 10 for width, loss in LOSSES.items()},
        "reference": REFERENCE,
        "tokens": 4096,
        "context": 64,
    }


def page(checkpoint: Path, out: Path, *records: dict[str, Any], **options: Any) -> str:
    write_report(checkpoint, out, records={f"record {place}": given for place, given in enumerate(records)}, **options)
    return out.read_text()


def table(text: str) -> dict[str, dict[str, str]]:
    """Row -> column -> cell of the first table, without tags."""
    clean = [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in rows(text, "widths")]
    return {row[0]: dict(zip(clean[0], row, strict=True)) for row in clean[1:]}


def advice(text: str) -> list[str]:
    found = re.findall(r'<p class="lead">(.*?)</p>', text)
    return [html.unescape(re.sub(r"<[^>]+>", "", line)) for line in found]


def test_every_width_has_its_cost_its_verdict_and_one_is_recommended(
    checkpoint: Path, record: dict[str, Any], tmp_path: Path
) -> None:
    text = page(checkpoint, tmp_path / "page.html", record)
    found, summary = table(text), summarise(open_checkpoint(checkpoint))["widths"]
    assert list(found) == ["float", "int8", "int6", "int4", "int3", "int2"]
    weights = sum(math.prod(shape) for shape in open_checkpoint(checkpoint).weight_shapes().values())
    assert found["float"]["size"] == size(4 * weights)  # the tiny model is in float32
    for (width, loss), words in zip(LOSSES.items(), WORDS, strict=True):
        row, here = found[f"int{width}"], summary[int(width)]
        assert row["size"] == size(here["model_bytes"])
        assert row["of float size"] == f"{100 * here['model_bytes'] / (4 * weights):.0f} %"
        assert row["bits per weight"] == f"{here['bits_per_weight']:.2f}"
        assert row["perplexity"] == f"{math.exp(REFERENCE + loss):.2f}"
        assert (row["loss"], row["KL divergence"]) == (f"{loss:.3f}", f"{loss / 2:.3f}")
        assert row["same top token"] == f"{100 - 10 * loss:.0f} %"
        assert row["verdict"] == words + (" recommended" if width == "6" else "")
    assert found["float"]["perplexity"] == "7.39"
    assert text.count('class="picked"') == 1
    first, choice, smaller = advice(text)
    assert first.startswith(f"Language model with {weights:,} parameters (Llama), quantised once")
    assert "from int8 down to int2" in first
    whole, six, four = (found[name]["size"] for name in ("float", "int6", "int4"))
    assert choice == (f"Choose int6: {six} instead of the float model's {whole}, perplexity 7.77 instead of 7.39.")
    assert smaller == f"If memory is short, int4: {four}, perplexity 9.03, clearly worse."
    assert text.index(choice[:12]) < text.index("<table") < text.index("LlamaForCausalLM")


def test_without_an_evaluation_the_page_says_how_to_measure(checkpoint: Path, tmp_path: Path) -> None:
    text = page(checkpoint, tmp_path / "page.html")
    assert list(table(text)["int4"]) == ["width", "size", "of float size", "bits per weight"]
    assert 'class="picked"' not in text
    assert "No width is recommended yet, because perplexity has not been measured." in advice(text)[1]
    assert text.index("matquant eval tiny --text heldout.txt") < text.index("<table")


def test_tasks_alone_and_old_records_show_what_they_have(
    checkpoint: Path, record: dict[str, Any], tmp_path: Path
) -> None:
    task = {"metric": "acc", "metrics": {"acc": 0.5}, "questions": 20, "fingerprint": "f"}
    tasks = {"bits_per_weight": {"4": 4.5}, "log_perplexity": {}, "reference": None}
    tasks |= {"tasks": {"4": {"boolq": task}}, "task_average": {"4": 0.5}}
    text = page(checkpoint, tmp_path / "tasks.html", tasks)
    assert table(text)["int4"]["task average"] == "50.0 %"
    assert table(text)["int8"]["task average"] == ""
    assert "verdict" not in table(text)["int4"]
    assert "mean accuracy over boolq" in text
    del record["kld"], record["top1"]
    both = table(page(checkpoint, tmp_path / "old.html", record, tasks))
    assert list(both["int4"])[-3:] == ["perplexity", "loss", "task average"]
    assert both["int4"]["verdict"] == "clearly worse"


def test_without_a_reference_int8_is_what_widths_are_compared_with(
    checkpoint: Path, record: dict[str, Any], tmp_path: Path
) -> None:
    record["reference"] = None
    text = page(checkpoint, tmp_path / "page.html", record)
    found = table(text)
    assert found["int8"]["verdict"] == found["int8"]["loss"] == found["float"]["perplexity"] == ""
    assert found["int6"]["loss"] == "0.040"
    assert found["int6"]["verdict"] == "slightly worse recommended"
    assert "perplexity 7.77 instead of int8's 7.46." in advice(text)[1]
    assert "log-perplexity above that of int8" in text


def test_fewer_stored_bits_show_no_wider_rows(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "four", to="matquant", bits=4)
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    (tmp_path / "four" / "config.json").write_text(json.dumps({**config, "dtype": None}))
    seal_checkpoint(tmp_path / "four")
    text = page(tmp_path / "four", tmp_path / "page.html")
    found = table(text)
    assert not {"float", "int8", "int6"} & set(found)
    assert found["int4"]["of int4 size"] == "100 %"
    assert "Start with int4, the most exact." in advice(text)[1]


def test_nothing_close_is_recommended_as_close(checkpoint: Path, record: dict[str, Any], tmp_path: Path) -> None:
    record["log_perplexity"] = {"8": 2.5, "2": 6.0}
    text = page(checkpoint, tmp_path / "page.html", record)
    assert advice(text)[1].startswith("Choose int8: ")
    assert advice(text)[2] == "All others lose more: nothing measured here stays within 0.1 nats per token."
    assert "recommended" not in "".join(row["verdict"] for row in table(text).values())


def test_plans_have_rows_and_other_texts_are_not_mixed_in(
    checkpoint: Path, record: dict[str, Any], tmp_path: Path
) -> None:
    shapes = open_checkpoint(checkpoint).shapes
    plan = {"name": "mine", "bits": dict.fromkeys(shapes, 5)}
    same = {**record, "log_perplexity": {"plan": REFERENCE + 0.03}, "bits_per_weight": {"plan": 5.5}, "plan": plan}
    del same["kld"], same["top1"]
    found = table(page(checkpoint, tmp_path / "same.html", record, same))
    assert list(found) == ["float", "int8", "int6", "mine", "int4", "int3", "int2"]
    assert found["mine"]["verdict"] == "slightly worse recommended"  # 5 bits are fewer than 6
    assert found["mine"]["size"] == size(summarise(open_checkpoint(checkpoint))["widths"][5]["model_bytes"])
    other = table(page(checkpoint, tmp_path / "other.html", record, {**same, "tokens": 100}))
    assert other["mine"]["verdict"] == other["mine"]["perplexity"] == ""
    named = tmp_path / "int4.json"
    named.write_text(json.dumps({"bits": dict.fromkeys(shapes, 2)}))
    two = table(page(checkpoint, tmp_path / "named.html", record, plans=[named]))
    assert (two["int4"]["verdict"], two["plan int4"]["verdict"]) == ("clearly worse", "")


def test_the_page_says_at_which_width_embedding_and_head_are_read(
    llama: Path, checkpoint: Path, tmp_path: Path
) -> None:
    words = "Embedding and head are quantised too and stay at int6 in narrower rows, unless a plan names them."
    made = tmp_path / "ends"
    matquant.quantize(llama, made, method="rtn", scope="all", grid="companded")
    text = page(made, tmp_path / "page.html")
    facts = dict(rows(text, "made"))
    assert words in text
    assert facts["what is quantised"] == "linear layers, embedding and head (--scope all)"
    assert facts["embedding and head"] == "quantised, read at int6 or wider"
    assert facts["grid"] == "companded: positions closer together near 0; symmetric"
    bare = page(checkpoint, tmp_path / "bare.html")
    assert words not in bare
    assert "Embedding and head are not quantised; " in bare
    assert dict(rows(bare, "made"))["embedding and head"] == "not quantised"
    assert dict(rows(bare, "made"))["grid"].startswith("uniform: evenly spaced positions; ")


def test_the_model_card_says_the_same_and_may_lie_in_the_checkpoint(
    llama: Path, record: dict[str, Any], tmp_path: Path
) -> None:
    made = conftest.quantize(llama, tmp_path / "made<i>|_", method="rtn", scope="linears")
    record["checkpoint"] = manifest_sha256(made)
    record |= {"plan": {"name": EVIL, "bits": dict.fromkeys(open_checkpoint(made).shapes, 5)}}
    record["log_perplexity"]["plan"] = REFERENCE
    card = page(made, made / "README.md", record)
    verify_checkpoint(made)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["made<i>|_"]
    with pytest.raises(InputError, match="--pareto and --sensitivity are not part of a model card; drop them"):
        page(made, tmp_path / "card.md", record, pareto=tmp_path / "pareto.json")
    assert card.startswith("---\nlibrary_name: matquant\n")
    assert "# made\\<i\\>\\|\\_\n" in card
    assert "<script" not in card.replace("\\<script", "")
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    head = next(line for line in lines if line.startswith("| width"))
    assert head == (
        "| width | verdict | size | of float size | bits per weight | perplexity | loss | KL divergence "
        "| same top token |"
    )
    four = next(line for line in lines if line.startswith("| int4"))
    assert four.startswith("| int4 | clearly worse | ")
    assert four.endswith(" % |")
    assert card.index("**Choose") < card.index("| width") < card.index("## How to run it") < card.index("sha256")
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("| int")} == {head.count("|")}


def test_verdicts_change_at_their_limits() -> None:
    assert [level(loss) for loss in (-1.0, 0.0199, 0.02, 0.0999, 0.1, 0.3, 1.0, math.inf)] == [0, 0, 1, 1, 2, 3, 4, 4]
    assert verdict(0.01, base="float") == "as good as float"
    losses, sizes = {"a": 0.05, "b": 0.09, "c": 0.1}, {"a": 3.0, "b": 2.0, "c": 1.0}
    assert smallest(losses, sizes, below=0.1) == "b"
    assert smallest(losses, sizes, below=0.01) is None


def test_numbers_for_people() -> None:
    assert [count_words(count) for count in (999_999, 134_515_008, 1_235_814_400)] == [
        "999,999", "135 million", "1.24 billion",
    ]  # fmt: skip
    assert [size(count) for count in (0, 999, 70272, 138.7e6)] == ["0 bytes", "999 bytes", "70.3 kB", "139 MB"]
    assert plain("a|b\n<c>") == "a\\|b \\<c\\>"
