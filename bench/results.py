"""docs/results.md: the paper's tables on our models, and what goes beyond them, from recorded measurements alone.

    python bench/results.py

Reads bench/quality.jsonl, peers.jsonl, gptq.json, blocks.json, train.json and plan.json; a row without a record is left
out. The paper's figures are those of its third version (arXiv 2502.06786 v3), Gemma-2 9B, log-perplexity on C4.
"""

import functools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matquant.planning.run import SEARCH
from matquant.planning.strategies import STRATEGIES
from matquant.report.tables import plot_widths
from mix import frontiers
from origin import ROOT
from plan import FREE, interpolate
from quality import ATTENTION, CELLS, CODISTILLATION, SETTINGS, TEST, WIDTHS, chosen, float_log_perplexity, records

RESULTS = ROOT / "docs" / "results.md"
Record = dict[str, Any]
Best = dict[str, dict[str, Record]]  # model -> cell -> its record at the best learning rate

# Table 1 and 2 of the paper: width -> (sliced int8, dedicated, MatQuant), log-perplexity of Gemma-2 9B
PAPER_TABLES = {
    "omniquant": {
        8: (None, 2.418, 2.438),
        4: (2.480, 2.451, 2.491),
        2: (15.226, 3.292, 3.187),
        6: (2.353, 2.420, 2.440),
        3: (3.977, 2.549, 2.607),
    },
    "qat": {
        8: (None, 2.29, 2.262),
        4: (2.276, 2.324, 2.295),
        2: (7.259, 2.923, 2.660),
        6: (2.232, 2.293, 2.265),
        3: (2.512, 2.43, 2.429),
    },
}


def main() -> None:
    """Write docs/results.md."""
    best = {model: _best(model) for model in SETTINGS}
    lines = [*INTRODUCTION]
    for model, text in SETTINGS.items():
        training, reference = text.training["qat"], float_log_perplexity(model)
        lines.append(
            f"- **{model}**: {TEST[model]:,} held-out tokens, float model {reference:.4f} nats/token; "
            f"QAT {training['steps']} steps of {training['batch_size']} x {training['seq_len']} tokens"
        )
    for part in (
        _verdicts,
        _tables,
        _figure_1b,
        _beyond,
        _candidates,
        _seeds,
        _gptq,
        _peers,
        _steps,
        _histograms,
        _plans,
    ):
        lines += ["", *part(best)]
    RESULTS.write_text("\n".join(lines) + "\n")
    print(f"wrote {RESULTS.relative_to(ROOT)}")


INTRODUCTION = (
    "# Results",
    "",
    "Written by `python bench/results.py` from the records in bench/*.jsonl, which have the command, commit, date",
    "and versions of every figure. Log-perplexity in nats per token, token-weighted, on held-out text, context 512;",
    "smaller is better. Every method of a table saw the same text for the same number of steps; baselines have the",
    "best of at least three learning rates, chosen on other held-out tokens, where a table does not say fewer.",
    "",
)


def _best(model: str, seed: int = 0) -> dict[str, Record]:
    """The record of each cell at the learning rate that the first seed chose, with how many of this seed there are."""
    made: dict[str, list[Record]] = {}
    for record in records():
        if record["model"] == model:
            made.setdefault(record["cell"], []).append(record)
    best: dict[str, Record] = {}
    for name, found in made.items():
        rate, of_seed = chosen(found)["lr"], [record for record in found if record["seed"] == seed]
        for record in of_seed:
            if record["lr"] == rate:
                best[name] = {**record, "tried": len(of_seed)}
    return best


def _value(cells: dict[str, Record], name: str, width: int) -> float | None:
    return cells[name]["log_perplexity"].get(str(width)) if name in cells else None


def _known(cells: dict[str, Record], name: str, width: int) -> float:
    value = _value(cells, name, width)
    return math.nan if value is None else value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]


# ------------------------------------------------------------------------------------------------------------ verdicts

Values = Callable[[str, int], float]  # cell, width -> log-perplexity


@dataclass(frozen=True, kw_only=True)
class Relation:
    """What the paper says and where, and the same asked of our models.

    cells: those it needs. holds: whether it does. difference: where it is that one is better than another, by how much,
    relative; its opposite is then "reversed".
    """

    what: str
    cells: tuple[str, ...]
    holds: Callable[[Values], bool]
    difference: Callable[[Values], float] | None = None


def _better_int2(what: str, cell: str, other: str) -> Relation:
    """That the int2 of a cell is better than another's."""
    return Relation(
        what=what,
        cells=(cell, other),
        holds=lambda v: v(cell, 2) < v(other, 2),
        difference=lambda v: v(cell, 2) / v(other, 2) - 1,
    )


def _relations(m: str) -> list[Relation]:
    """What the paper says of both methods."""
    joint, int2, int8, single, distilled = (
        f"{m} {k}" for k in ("joint", "int2", "int8", "single", "joint 8,4,2,8->4;2")
    )
    return [
        _better_int2(f"{m}: int2 MatQuant better than dedicated int2 (Tables 1, 2)", joint, int2),
        Relation(
            what=f"{m}: sliced int8 collapses at int2, over 1 nat above dedicated (Tables 1, 2)",
            cells=(int8, int2),
            holds=lambda v: v(int8, 2) > v(int2, 2) + 1,
        ),
        Relation(
            what=f"{m}: int6 interpolates, within 1 % of int8 and int4 (Tables 1, 2)",
            cells=(joint,),
            holds=lambda v: v(joint, 6) <= 1.01 * max(v(joint, 8), v(joint, 4)),
        ),
        Relation(
            what=f"{m}: int3 interpolates, between int4 and int2 (Tables 1, 2)",
            cells=(joint,),
            holds=lambda v: v(joint, 4) <= v(joint, 3) <= v(joint, 2),
        ),
        _better_int2(f"{m}: S.P. better than joint at int2 (Table 5)", single, joint),
        Relation(
            what=f"{m}: co-distillation 8->4;2 changes int2 by less than 2 % (Table 4)",
            cells=(distilled, joint),
            holds=lambda v: abs(v(distilled, 2) / v(joint, 2) - 1) < 0.02,
        ),
    ]


RELATIONS: list[Relation] = [
    *_relations("omniquant"),
    *_relations("qat"),
    _better_int2("omniquant: E.P. helps int2 (Table 7)", "omniquant extra", "omniquant joint"),
    _better_int2("qat: E.P. does not help int2 (Table 5)", "qat joint", "qat extra"),
    Relation(
        what="qat, FFN + attention: int2 over 0.1 nats worse than FFN alone (Table 6)",
        cells=("qat all joint", "qat joint"),
        holds=lambda v: v("qat all joint", 2) > v("qat joint", 2) + 0.1,
    ),
]


def _verdicts(best: Best) -> list[str]:
    second = {model: _best(model, seed=1) for model in best}
    rows = []
    for relation in RELATIONS:
        answers = []
        for model, cells in best.items():
            answer = _verdict(relation, cells) or "not run"
            again = _verdict(relation, second[model])
            answers.append(f"{answer}; second seed: {again}" if again else answer)
        rows.append([relation.what, *answers])
    right = (
        "the distribution of 8-bit codes moves to the right (Figures 1c, 4)",
        *["does not hold: the symmetric grid keeps its mean at 128; codes gather at the borders of int2 bins"]
        * len(best),
    )
    return [
        "## The paper's relations",
        "",
        "In brackets: int2 of the one that the paper has better, against the other.",
        "",
        *_table(["relation", *best], [*rows, right]),
    ]


def _verdict(relation: Relation, cells: dict[str, Record]) -> str | None:
    """Plain, with the difference where there is one; None without the records."""
    if not set(relation.cells) <= set(cells):
        return None
    values = functools.partial(_known, cells)
    holds = relation.holds(values)
    if relation.difference is None:
        return "holds" if holds else "does not hold"
    return f"{'holds' if holds else 'reversed'} ({relation.difference(values):+.2%})"


# -------------------------------------------------------------------------------------------------------------- tables


def _tables(best: Best) -> list[str]:
    lines: list[str] = []
    for number, method in ((1, "omniquant"), (2, "qat")):
        lines += [f"## Table {number}: {method}, FFN", ""]
        rows = []
        for width, paper in PAPER_TABLES[method].items():
            kinds = (
                ("sliced int8", f"{method} int8"),
                ("dedicated", f"{method} int{width}"),
                ("MatQuant", f"{method} joint"),
            )
            for (kind, cell), printed in zip(kinds, paper, strict=True):
                if width != 8 or kind != "sliced int8":
                    values = [_number(_value(cells, cell, width)) for cells in best.values()]
                    rows.append([f"int{width}", kind, *values, "" if printed is None else f"{printed:.3f}"])
        lines += [*_table(["", "", *best, "paper, 9B"], rows), ""]
    for method in ("omniquant", "qat"):
        lines += _widths_table(
            f"## Table 3: lambda of widths 8, 4 ({method})",
            best,
            [f"{method} joint", *(f"{method} joint {w}" for w in (0.2, 0.3, 0.4, 0.5))],
        )
        lines += _widths_table(
            f"## Table 4: co-distillation ({method})",
            best,
            [f"{method} joint", *(f"{method} joint {o}" for o in CODISTILLATION)],
        )
    names = [f"{m} {k}" for m in ("omniquant", "qat") for k in ("int2", "single", "joint", "single extra", "extra")]
    lines += _widths_table("## Table 5: int2 and what is sliced from the same model", best, names)
    lines += _widths_table("## Table 6: FFN + attention, QAT", best, ATTENTION)
    names = [f"{m} {k}" for m in ("omniquant", "qat") for k in ("joint", "extra")]
    lines += _widths_table("## Table 7: extra precision", best, names, bits=True)
    names = [f"{m} extra{o}" for m in ("omniquant", "qat") for o in ("", *(f" {o}" for o in CODISTILLATION))]
    return lines + _widths_table("## Table 8: co-distillation within extra precision", best, names)[:-1]


def _widths_table(title: str, best: Best, names: Sequence[str], *, bits: bool = False) -> list[str]:
    rows = []
    for model, cells in best.items():
        for name in names:
            if name in cells:
                record = cells[name]
                rate = f"{record['lr']:g} of {record['tried']}" if record["lr"] else "-"
                row = [model, name.split()[0], CELLS[name].what, rate]
                row += [_number(_value(cells, name, width)) for width in WIDTHS]
                narrow = str(min(map(int, record["bits_per_weight"])))
                rows.append([*row, f"{record['bits_per_weight'][narrow]:.3f}"] if bits else row)
    header = ["model", "method", "", "lr", *(f"int{width}" for width in WIDTHS), *(["bits at int2"] if bits else [])]
    return [title, "", *(_table(header, rows) if rows else ["not run"]), ""]


def _figure_1b(best: Best) -> list[str]:
    """Log-perplexity over widths: min-max, sliced int8, dedicated, MatQuant and ours; one picture a model."""
    lines = ["## Figure 1b: QAT over widths", ""]
    for model, cells in best.items():
        curves: dict[str, tuple[list[float], list[float]]] = {}
        whole = {"MinMax, sliced": "rtn round", "sliced int8": "qat int8", "MatQuant 8,4,2": "qat joint"}
        whole["ours, one checkpoint"] = "qat+ joint"
        for name, cell in whole.items():
            if cell in cells:
                curves[name] = _curve([(cells[cell], width) for width in WIDTHS])
        dedicated = [(cells[f"qat int{width}"], width) for width in WIDTHS if f"qat int{width}" in cells]
        if dedicated:
            curves["dedicated, one model a width"] = _curve(dedicated)
        if curves:
            file = f"widths-{model}.png"
            plot_widths(ROOT / "docs" / file, curves, reference=float_log_perplexity(model))
            lines += [f"![log-perplexity over widths, {model}]({file})", ""]
    return lines[:-1]


def _curve(points: Sequence[tuple[Record, int]]) -> tuple[list[float], list[float]]:
    """Bits per weight and log-perplexity of records, each at a width."""
    return (
        [record["bits_per_weight"][str(width)] for record, width in points],
        [record["log_perplexity"][str(width)] for record, width in points],
    )


def _beyond(best: Best) -> list[str]:
    lines = [
        "## Beyond the paper: one nested checkpoint against a dedicated model for every width",
        "",
        "In brackets: against the paper's dedicated models, then against the best dedicated models when they are given",
        "our improvements too (learned clips and affines, the float model as teacher, codes from GPTQ).",
        "",
    ]
    for method in ("qat", "omniquant", "gptq"):
        for model, cells in best.items():
            names = [  # of as many steps as the dedicated models
                name for name in cells if name.startswith(f"{method}+ joint") and "steps" not in CELLS[name].options
            ]
            if not names:
                continue
            rows = []
            plain = [_dedicated(cells, method, width, kinds=("",)) for width in WIDTHS]
            dedicated = [_dedicated(cells, method, width) for width in WIDTHS]
            if any(plain):
                rows.append(["dedicated models, the paper's", *map(_number, plain)])
            rows.append(["best dedicated models, improved", *map(_number, dedicated)])
            for name in names:
                values = [_value(cells, name, width) for width in WIDTHS]
                rows.append([CELLS[name].what, *map(_beside, values, plain, dedicated)])
            lines += [f"{method}, {model}:", "", *_table(["", *(f"int{width}" for width in WIDTHS)], rows), ""]
            if all(plain):
                met = [CELLS[name].what for name in names if _met(cells, name, plain)]
                lines += [
                    "Better than the paper's dedicated models at int2 and int3 and within 1 % at int4, int6 and int8: "
                    f"{'; '.join(met) or 'none'}.",
                    "",
                ]
    return lines[:-1]


def _candidates(best: Best) -> list[str]:
    """What was tried for all widths at once, each against the joint run that it changes."""
    rows = []
    for model, cells in best.items():
        base = [_value(cells, EVEN, width) for width in WIDTHS]
        for name in (EVEN, *(name for name in cells if name.startswith("qat+ try"))):
            if name in cells:
                what = "as it is" if name == EVEN else CELLS[name].what
                values = [_value(cells, name, width) for width in WIDTHS]
                rows.append([model, what, *(map(_number, values) if name == EVEN else map(_beside, values, base))])
    head = [
        "### Candidates",
        "",
        "QAT of all widths at equal steps and data; one thing changed at a time. In brackets against the first row,",
        "whose second seed differs by up to 0.5 % (int3). Where the library has no option, bench/trials.py changes it.",
        "",
    ]
    return [*head, *_table(["model", "", *(f"int{width}" for width in WIDTHS)], rows)] if len(rows) > 1 else []


def _beside(value: float | None, *others: float | None) -> str:
    shown = ", ".join(f"{value / other - 1:+.2%}" for other in others if value and other)
    return f"{_number(value)} ({shown})" if shown else _number(value)


def _met(cells: dict[str, Record], name: str, dedicated: Sequence[float | None]) -> bool:
    """Whether a checkpoint is better than dedicated models at int2 and int3, and within 1 % of the others."""
    ratios = [(_value(cells, name, w) or math.inf) / (d or math.inf) for w, d in zip(WIDTHS, dedicated, strict=True)]
    return all(r < (1 if w <= 3 else 1.01) for w, r in zip(WIDTHS, ratios, strict=True))


def _dedicated(
    cells: dict[str, Record], method: str, width: int, *, kinds: Sequence[str] = ("", "+", "+start", "+distilled")
) -> float | None:
    """The best of the paper's baseline and the improved ones, on SELECT tokens being alike, by what it reached."""
    found = [_value(cells, f"{method}{kind} int{width}", width) for kind in kinds]
    return min((value for value in found if value is not None), default=None)


def _seeds(best: Best) -> list[str]:
    """What the order of the data changes, where a second seed was run."""
    rows, noise = [], []
    for model, cells in best.items():
        second = _best(model, seed=1)
        names = [name for name in CELLS if name in second]
        for name in names:
            values = [_beside(_value(second, name, width), _value(cells, name, width)) for width in WIDTHS]
            rows.append([model, f"`{name}`", *values])
        noise.append([model, str(len(names)), *(_noise(cells, second, names, width) for width in WIDTHS)])
    widths = [f"int{width}" for width in WIDTHS]
    return [
        "## A second seed",
        "",
        "The order of the data changed, at the learning rate that the first seed chose and in its precision (for the",
        "one-shot cells also the calibration windows of nested GPTQ and the order of each phase). Many ran",
        "on a GPU where the first had not, which alone changes at most 0.06 % of the embedded model and 0.18 %",
        "of stories260K (docs/log.md). Differences of the two from each other, median and largest:",
        "",
        *_table(["model", "cells", *widths], noise),
        "",
        "Cells are those of `python bench/quality.py cells`; in brackets: against the first.",
        "",
        *_table(["model", "cell", *widths], rows),
    ]


def _noise(cells: dict[str, Record], second: dict[str, Record], names: Sequence[str], width: int) -> str:
    """The median and the largest difference between two seeds at a width, of the cells that train it."""
    found = [
        abs(_known(second, name, width) / _known(cells, name, width) - 1)
        for name in names
        if _value(second, name, width) is not None
    ]
    return f"{statistics.median(found):.2%}, {max(found):.2%}" if found else ""


def _gptq(best: Best) -> list[str]:
    names = [name for name in CELLS if name.startswith(("rtn", "gptq"))]
    lines = _widths_table("## One pass: nested GPTQ", best, names, bits=True)
    kept = _kept("gptq.json")
    return [*lines, *_against_matgptq(kept), *_costs(kept), *_memory(_kept("blocks.json"))][:-1]


def _kept(name: str) -> Record:
    file = ROOT / "bench" / name
    return json.loads(file.read_text()) if file.is_file() else {}


def _against_matgptq(kept: Record) -> list[str]:
    """Summed output errors of nested GPTQ relative to MatGPTQ's, by model and width set."""
    if "quality" not in kept:
        return []
    rows = []
    for case, variants in kept["quality"]["results"].items():
        theirs, ours = variants["MatGPTQ"], variants["ours"]
        rows.append(
            [
                *case.split("; "),
                f"{ours['weighted'] / theirs['weighted']:.2f}",
                ", ".join(f"int{bits} {error / theirs['widths'][bits]:.2f}" for bits, error in ours["widths"].items()),
                str(ours["layers_better"]),
            ]
        )
    return [
        "### Against MatGPTQ",
        "",
        f"`{kept['quality']['command']}`: output error in the Hessian's norm, ours over MatGPTQ's (the published",
        "objective, re-implemented), same Hessians; below 1 is better. Linears: where the weighted error is lower.",
        "",
        *_table(["model", "widths", "weighted sum", "each width", "linears"], rows),
        "",
    ]


def _costs(kept: Record) -> list[str]:
    """Seconds of all widths at once over one dedicated pass."""
    rows = []
    if "whole" in kept:
        rows.append(["embedded model, from file to file", f"{kept['whole']['ratio']:.2f} x", kept["whole"]["command"]])
    for shape, figures in kept["cost"]["results"].items() if "cost" in kept else ():
        first = figures["pass_s"]["dedicated int4"]
        for what, extra in (("with its Hessian", figures["accumulation_s"]), ("the solver alone", 0.0)):
            ratios = [(a + extra) / (b + extra) for a, b in zip(figures["pass_s"]["nested 86432"], first, strict=True)]
            text = f"one linear of {shape}, {kept['cost']['tokens']:,} tokens, {what}"
            rows.append([text, f"{statistics.median(ratios):.2f} x", kept["cost"]["command"]])
    if not rows:
        return []
    head = [
        "### What five widths at once cost",
        "",
        "Against one dedicated int4 pass of ours, interleaved, one thread.",
        "",
    ]
    return [*head, *_table(["", "ratio", "command"], [[a, b, f"`{c}`"] for a, b, c in rows]), ""]


def _memory(kept: Record) -> list[str]:
    """Peak resident memory by depth."""
    if not kept:
        return []
    rows = [
        [depth, *(f"{figures[key] / 2**30:.2f} GiB" for key in ("model_bytes", "peak_bytes"))]
        for depth, figures in kept["layers"].items()
    ]
    head = ["### Memory by depth", "", f"`{kept['command']}`: random Llamas 2048 wide, peak resident memory.", ""]
    return [*head, *_table(["layers", "model", "peak"], rows), ""]


EVEN = "qat+ joint even"
STANDING = {  # the last of each that a model has
    "one-shot": ("gptq+ all", "qat+ all one-shot", "qat+ all one-shot 128"),
    "trained": ("distill trained 128", "qat+ all plans"),
}
OURS_ALL = (
    "gptq+ all",
    "gptq+ all 128",
    "qat+ all last 128 centre",
    "qat+ all one-shot",
    "qat+ all one-shot 128",
    "distill trained 128",
    "qat+ all plans",
)


def _peers(best: Best) -> list[str]:
    """Peers and ours on all linears of the decoder layers; and the picture."""
    file = ROOT / "bench" / "peers.jsonl"
    peers = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    lines = [
        "## Peers: all linears, same text, honest bits",
        "",
        "Each figure is log-perplexity @ bits per weight of the quantised linears, everything that is stored counted.",
        "A peer's figures are one checkpoint each, ours are slices of one. Settings: bench/peers.py. The rows of",
        "stories260K are 64 and 172 long: AutoRound keeps a linear in float unless 32 divides both its sides, so",
        "all of that FFN; llama.cpp, whose K-quants take 256 weights at a time, falls back to blocks of 32 with more",
        "bits, and to float16 for the rows of 172.",
        "",
    ]
    for model, cells in best.items():
        rows: dict[str, dict[int, str]] = {}
        curves: dict[str, tuple[list[float], list[float]]] = {}
        for record in peers:
            if record["model"] != model or record["peer"] == "float":
                continue
            failed = "error" in record
            text = "fails" if failed else f"{record['log_perplexity']:.4f} @ {record['bits_per_weight']:.3f}"
            rows.setdefault(f"{record['peer']}, {record['setting']}", {})[record["bits"]] = text
            if not failed and record["log_perplexity"] < 1.1 * _worst_shown(cells):
                name = f"{record['peer']}, its best settings"
                _add(curves, name, record["bits_per_weight"], record["log_perplexity"])
        for cell in OURS_ALL:
            if cell in cells:
                values, bits = cells[cell]["log_perplexity"], cells[cell]["bits_per_weight"]
                rows[f"**{CELLS[cell].what}** (one checkpoint)"] = {
                    width: f"{values[str(width)]:.4f} @ {bits[str(width)]:.3f}" for width in WIDTHS
                }
        table = [[name, *(found.get(width, "") for width in (2, 3, 4, 6, 8))] for name, found in rows.items()]
        lines += [f"{model}:", "", *_table(["", "2", "3", "4", "6", "8"], table), ""]
        lines += _standing(cells, [r for r in peers if r["model"] == model and "error" not in r])
        if model == "reference":
            curves = frontiers(curves)
            for what, name in {"nested GPTQ": "gptq+ all", **_ours(cells)}.items():
                curves[f"ours, {what}: one checkpoint"] = _curve([(cells[name], width) for width in WIDTHS])
            plot_widths(ROOT / "docs" / "peers.png", curves, reference=float_log_perplexity(model))
            lines += ["![log-perplexity against bits per weight, peers and ours](peers.png)", ""]
            lines += [
                "Of a peer the settings that no other of its own beats at fewer bits; what is far off is left out.",
                "",
            ]
    return lines[:-1]


def _ours(cells: dict[str, Record]) -> dict[str, str]:
    """STANDING's cell of each kind that a model has."""
    return {kind: name for kind, names in STANDING.items() for name in names if name in cells}


SLACK = 0.1  # bits per weight that a peer may take more than ours and still count as equal


def _standing(cells: dict[str, Record], peers: list[Record]) -> list[str]:
    """Our best one-shot and trained checkpoints against the best peer that takes no more bits, whatever it calls its
    width; then against those of the nominal width, at SLACK more bits and at any."""
    rows = []
    for width in (2, 3, 4, 6, 8):
        same = [peer for peer in peers if peer["bits"] == width]
        for kind, name in _ours(cells).items():
            value, bits = cells[name]["log_perplexity"][str(width)], cells[name]["bits_per_weight"][str(width)]
            rivals = (
                [peer for peer in peers if peer["bits_per_weight"] <= bits],
                [peer for peer in same if peer["bits_per_weight"] <= bits + SLACK],
                same,
            )
            row = [f"int{width}", kind, CELLS[name].what, f"{value:.4f} @ {bits:.3f}"]
            for found in rivals:
                best = min(found, key=lambda peer: peer["log_perplexity"], default=None)
                row.append(
                    f"{value - best['log_perplexity']:+.4f} ({best['peer']} {best['setting']}, "
                    f"{best['bits_per_weight']:.3f} bits)"
                    if best
                    else "none"
                )
            rows.append(row)
    if not rows or not peers:
        return []
    head = ["", "", "ours, one checkpoint", "", "against the best peer at no more bits"]
    head += [f"of that width, within {SLACK} bits", "of that width, at any bits"]
    return ["Where we stand (nats per token, negative is better than the peer):", "", *_table(head, rows), ""]


def _worst_shown(cells: dict[str, Record]) -> float:
    """The int2 figure of our one-pass checkpoint; what is far above it would flatten the picture."""
    return _value(cells, "gptq+ all", 2) or math.inf


def _steps(best: Best) -> list[str]:
    record = _kept("train.json")
    if not record:
        return []
    rows = [[n, f"{r:.2f} x", f"{record['memory_ratio'][n]:.2f} x"] for n, r in record["time_ratio"].items()]
    return [
        "## What a joint step costs",
        "",
        f"`{record['command']}` on {record['machine']}: a step over 8, 4, 2 against an ordinary fine-tuning step of",
        "the same model (111 M parameters) and batch, interleaved.",
        "",
        *_table(["step", "time", "peak memory"], rows),
    ]


def _histograms(best: Best) -> list[str]:
    return [
        "## The shape of the codes (Figures 1c and 4)",
        "",
        "`make demo` draws the 8-bit codes of the embedded model. On our symmetric grid the distribution does not move",
        "to the right, its mean code stays 128; it gathers at the borders of the int2 bins and, where clipping is",
        "learned, at both ends.",
        "",
        "![8-bit codes of MatQuant and of the int8 baseline](histograms.png)",
    ]


def _plans(best: Best) -> list[str]:
    record = _kept("plan.json")
    lines = [
        "## Mix'n'Match (Figure 2)",
        "",
        "A width per layer of one resident checkpoint (docs/planning.md): log-perplexity on the TEST tokens at no more",
        "than so many honest bits per weight. The search was told the training text only; *interpolated* is the line",
        "between the uniform widths 2, 3, 4, 6, 8 around that budget; the smallest of a row is bold. Where a budget",
        "allows no mix, all are int2. A plan has steps of whole linears and so stays below its budget, the line does",
        "not: the last two columns compare at the bits that the plan takes.",
        "",
    ]
    for name in sorted(set(record) - {"growth"}):
        found, model = record[name], name.split(",")[0]
        file = f"plans-{name.replace(', ', '-').replace(' ', '-').replace('+', '')}.png"
        rows, names = [], list(next(iter(found["budgets"].values())))
        for bits, values in found["budgets"].items():
            row = {n: v["held_out"] if isinstance(v, dict) else v for n, v in values.items()}
            cells = [f"**{v:.4f}**" if v == min(row.values()) else f"{v:.4f}" for v in row.values()]
            for way in (SEARCH, FREE):
                used = values[way]["bits_per_weight"]
                line = interpolate(used, found["uniform"])
                cells.append(f"{values[way]['held_out'] - line:+.4f} @ {used:.3f}")
            rows.append([bits, *cells])
        header = ["bits", *names, "search above the line @ its own bits", "not fused"]
        lines += [f"{model}, `{found['command']}`, cell {found['cell']!r}:", "", *_table(header, rows), ""]
        lines += [
            *_plan_claims(found),
            "",
            f"![log-perplexity of plans against bits per weight]({file})",
            "",
        ]
        curves: dict[str, tuple[list[float], list[float]]] = {}
        for width, point in found["uniform"].items():
            kind = "trained" if int(width) in found["trained"] else "interpolated"
            _add(curves, f"uniform, {kind}", point["bits_per_weight"], point["held_out"])
        for values in found["budgets"].values():
            for way, point in values.items():
                if isinstance(point, dict):
                    _add(curves, way, point["bits_per_weight"], point["held_out"])
        dedicated = "qat all" if CELLS[found["cell"]].options.get("scope") == "all" else "qat+"
        for cell, width in ((best[model].get(f"{dedicated} int{width}"), str(width)) for width in WIDTHS):
            if cell:
                bits, value = cell["bits_per_weight"][width], cell["log_perplexity"][width]
                _add(curves, "dedicated", bits, value)
        plot_widths(ROOT / "docs" / file, curves, reference=found["float"])
    if "growth" in record:
        growth = record["growth"]
        names = ["layers", "widths", "evaluations", "cpu_seconds", "evolution", "fewer"]
        rows = [[str(row[name]) for name in names] for row in growth["rows"]]
        head = ["layers", "widths", "evaluations", "CPU s", "evolutionary search", "times fewer"]
        lines += [f"A first search of random models, all linears, `{growth['command']}`:", "", *_table(head, rows), ""]
    return [
        *lines,
        "Every mix of 2, 4 and 8 bits of nested GPTQ of stories260K in the paper's four forms, the best ones of each,",
        "on the first 20,480 held-out tokens (bench/mix.py):",
        "",
        "![log-perplexity of mixes against bits per weight](mix-stories260K.png)",
    ]


def _add(curves: dict[str, tuple[list[float], list[float]]], name: str, bits: float, value: float) -> None:
    sizes, values = curves.setdefault(name, ([], []))
    sizes.append(bits)
    values.append(value)


def _plan_claims(found: Record) -> list[str]:
    """The paper's two claims about plans, on this model."""
    four = found["uniform"]["4"]
    below = [
        (p["held_out"], bits, n)
        for bits, v in found["budgets"].items()
        for n, p in v.items()
        if isinstance(p, dict) and p["bits_per_weight"] < 4
    ]
    value, bits, name = min(below)
    winners = [min(STRATEGIES, key=lambda form: values[form]["held_out"]) for values in found["budgets"].values()]
    claims = (
        f"The best plan under 4 bits ({name} at {bits}: {value:.4f}) is {_against(value, four)} uniform int4 "
        f"({four['held_out']:.4f} at {four['bits_per_weight']:.3f} bits). "
    )
    for way, plan in found.get("smaller_than_int4", {}).items():
        claims += (
            f"Told to be smaller than int4, {way} takes {plan['bits_per_weight']:.3f} bits: "
            f"{plan['held_out']:.4f}, {_against(plan['held_out'], four)} int4. "
        )
    claims += (
        f"Of the paper's strategies pyramid is the best at {winners.count('pyramid')} of {len(winners)} budgets "
        f"({', '.join(winners)})."
    )
    return [claims]


def _against(value: float, other: Record) -> str:
    return "at least as good as" if value <= other["held_out"] else "worse than"


if __name__ == "__main__":
    main()
