"""How good each method is on real models: one JSON line per cell, resumable.

    python experiments/quality.py cells                                  what there is
    python experiments/quality.py run MODEL [CELL]... [--seed N]         train and evaluate what has no record yet

A cell is a method with its options (CELLS), on a model (SETTINGS); experiments/quality.jsonl has a record of it for
every learning rate and seed. Every cell of a model and method sees the same text in the same order for the same number
of steps. A learning rate is chosen on SELECT tokens by the cell's own objective, with seed 0; the figures are those of
the disjoint TEST tokens. Other seeds run at that rate and in the first one's precision. Records of cells that are no
longer here keep their figures (experiments/log.md); experiments/results.py writes experiments/results.md.
"""

import dataclasses
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import matquant
from matquant.format.read import open_checkpoint
from matquant.format.sizes import bits_per_weight
from matquant.hf.text import read_documents, token_stream
from matquant.hf_torch.device import bf16_is_fast
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.measure.likelihood import evaluate, log_perplexity

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from origin import ROOT, origin

RECORDS = ROOT / "experiments" / "quality.jsonl"
DATA = Path(os.environ.get("MATQUANT_DATA", ROOT.parent / "shared" / "data"))
CACHE = Path(os.environ.get("MATQUANT_CACHE", Path.home() / ".cache" / "matquant"))
WIDTHS = (8, 6, 4, 3, 2)
CONTEXT = 512
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Options = dict[str, Any]
Streams = tuple[np.ndarray, np.ndarray]  # TEST and SELECT tokens


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model with its text. skip: documents left out at the start of ``held_out``. training: method -> settings."""

    path: Path
    text: Path
    held_out: Path
    skip: int
    training: dict[str, Options]


OMNIQUANT: Options = {"samples": 64, "seq_len": 256, "batch_size": 4, "steps": 200}
SETTINGS = {
    "stories260K": Setting(
        path=DATA / "models" / "stories260K",
        text=DATA / "text" / "tinystories-train.txt",
        held_out=DATA / "text" / "tinystories-valid.txt",
        skip=1,
        training={
            "qat": {"steps": 300, "batch_size": 8, "seq_len": 256},
            "gptq": {"seq_len": 512},
            "omniquant": OMNIQUANT,
        },
    ),
    "reference": Setting(
        path=ROOT / "examples" / "reference" / "model",
        text=ROOT / "examples" / "reference" / "text" / "train.txt",
        held_out=ROOT / "examples" / "reference" / "text" / "valid.txt",
        skip=0,
        training={
            "qat": {"steps": 150, "batch_size": 8, "seq_len": 256, "autocast": bf16_is_fast()},
            "gptq": {"seq_len": 512},
            "omniquant": {**OMNIQUANT, "steps": 100, "autocast": bf16_is_fast()},
        },
    ),
}
TEST = {"stories260K": 117 * CONTEXT, "reference": 80 * CONTEXT}  # tokens, the first ones
SELECT = {"stories260K": 60 * CONTEXT, "reference": 40 * CONTEXT}  # tokens, the ones after them

FFN: Options = {"method": "qat", "scope": "ffn", "group_size": None}  # the paper's setting; a cell's options go over it
PLAIN: Options = {"affine": "none"}
PAPER: Options = {**PLAIN, "rule": "round", "objective": "8,4,2"}
EVEN: Options = {"weights": (1.0, 1.0, 1.0)}
RATES = (1e-3, 2e-3, 4e-3)
LOW = (1.25e-4, 2.5e-4, 5e-4, 1e-3)
WARM: dict[int, tuple[float, ...]] = {8: LOW, 6: LOW, 4: LOW, 3: (2.5e-4, 5e-4, *RATES), 2: (5e-4, *RATES)}
CALIBRATION = 128 * CONTEXT  # tokens, what peers calibrate with (experiments/peers.py)
CODISTILLATION = ("8,4,8->2", "8,4,2,8->2", "8,4,2,8->4;2")
ATTENTION = tuple(
    f"qat all {row}" for row in ("int8", "int4", "int3", "int2", "joint", "single", "single 3")
)  # Table 6
STORIES = ("stories260K",)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A checkpoint to make: its name in the tables, the options of quantize, the learning rates to try.

    default: whether it runs without being named."""

    what: str
    options: Options
    rates: tuple[float | None, ...] = (None,)
    models: tuple[str, ...] = tuple(SETTINGS)
    default: bool = True


def _paper(
    method: str,
    joint: tuple[float | None, ...],
    dedicated: Mapping[int, tuple[float | None, ...]],
    *,
    scope: str = "ffn",
    rule: str = "round",
) -> dict[str, Cell]:
    """The rows of the paper's tables for a method: its baselines, and everything it calls MatQuant."""
    paper: Options = {**PAPER, "method": method, "rule": rule, **({"scope": scope} if scope != "ffn" else {})}
    extra = {**paper, "rule": "extra", **EVEN}
    # 4e-3 was the worst rate of "qat joint" on both models; the variants of "joint" have the rate it chose on both
    steady, chosen = (joint, joint[1:2]) if method == "omniquant" else (joint[:2], joint[:1])
    cells = {
        f"int{bits}": Cell(what=f"dedicated int{bits}", options={**paper, "baseline_bits": bits}, rates=rates)
        for bits, rates in dedicated.items()
    }
    cells |= {
        "joint": Cell(what="MatQuant 8,4,2", options=paper, rates=(5e-4, *joint) if method == "qat" else joint),
        "single": Cell(what="S.P. MatQuant 2", options={**paper, "objective": "2"}, rates=steady),
        "single 3": Cell(what="S.P. MatQuant 3", options={**paper, "objective": "3"}, rates=steady),
        "extra": Cell(what="E.P. MatQuant 8,4,2", options=extra, rates=steady),
        "single extra": Cell(
            what="S.P. E.P. MatQuant 2", options={**paper, "rule": "extra", "objective": "2"}, rates=steady
        ),
    }
    for weight in (0.2, 0.3, 0.4, 0.5):
        options = {**paper, "weights": (weight, weight, 1.0)}
        cells[f"joint {weight}"] = Cell(what=f"lambda {weight}, {weight}, 1", options=options, rates=chosen)
    for objective in CODISTILLATION if method != "gptq" else ():
        for name, options in (("joint", paper), ("extra", extra)):
            cells[f"{name} {objective}"] = Cell(
                what=objective, options={**options, "objective": objective}, rates=chosen
            )
    return {f"{method}{' all' if scope == 'linears' else ''} {name}": cell for name, cell in cells.items()}


def _matrix() -> dict[str, Cell]:
    """The paper's rows with every method, scope and rule; those that no table of results.py has run when named."""
    cells: dict[str, Cell] = {}
    alone: dict[int, tuple[float | None, ...]] = dict.fromkeys(WIDTHS, (None,))
    for scope in ("ffn", "linears"):
        for method, joint, dedicated in (
            ("omniquant", STEADY, CLIPPED),
            ("qat", RATES, WARM),
            ("gptq", (None,), alone),
        ):
            cells |= _paper(method, joint, dedicated, scope=scope)
            for name, cell in _paper(method, joint, dedicated, scope=scope, rule="prefix").items():
                if "extra" not in name and "baseline_bits" not in cell.options:  # theirs is no other rule's
                    cells[f"{name} prefix"] = cell
        rtn: Options = {**PLAIN, "method": "rtn", "scope": scope}
        where = " all" if scope == "linears" else ""
        cells |= {
            f"rtn{where} int{bits}": Cell(what=f"dedicated int{bits}", options={**rtn, "baseline_bits": bits})
            for bits in WIDTHS
        }
        cells[f"rtn{where} extra"] = Cell(what="round to nearest, sliced (Eq. 8)", options={**rtn, "rule": "extra"})
    shown = {*_paper("omniquant", STEADY, CLIPPED), *_paper("qat", RATES, WARM), *ATTENTION}
    shown -= {"omniquant single 3", "qat single 3"}
    return {name: dataclasses.replace(cell, default=name in shown) for name, cell in cells.items()}


def _ours(
    method: str, more: Options, joint: tuple[float, ...], dedicated: dict[int, tuple[float, ...]]
) -> dict[str, Cell]:
    """Beyond the paper: the best objective found, and dedicated models given the same improvements."""
    options = {"method": method, "affine": "learned", **more}
    cells = {
        f"int{bits}": Cell(
            what=f"dedicated int{bits}, learned clip and affine, {target}",
            options={"method": method, "affine": "learned", "baseline_bits": bits, "objective": target},
            rates=rates,
        )
        for bits, rates in dedicated.items()
        for target in ((f"{bits},fp->{bits}",) if method == "qat" else (f"{bits}",))
    }
    cells["joint"] = Cell(what=f"one nested checkpoint, {more['objective']}", options=options, rates=joint)
    return {f"{method}+ {name}": cell for name, cell in cells.items()}


TUNED: Options = {"tune": 60, "autocast": bf16_is_fast()}


def _one_pass() -> dict[str, Cell]:
    """Nested GPTQ and its dedicated passes."""
    gptq: Options = {"method": "gptq", "objective": "8,6,4,3,2"}  # the widths of the records
    cells = {
        f"gptq+ int{bits}": Cell(what=f"dedicated int{bits}", options={**gptq, "baseline_bits": bits})
        for bits in (8, 6, 4, 3, 2)
    }
    cells |= {
        "gptq+ joint": Cell(what="nested, prefix", options=gptq),
        "gptq+ joint companded": Cell(what="nested, companded grid", options={**gptq, "grid": "companded"}),
        "gptq+ joint even": Cell(what="nested, prefix, lambda 1", options={**gptq, "weights": (1.0,) * 5}),
        "gptq+ joint round": Cell(what="nested, Eq. 6", options={**gptq, "rule": "round"}),
        "gptq+ joint even centre": Cell(
            what="nested, prefix, lambda 1, mid-range zero-points",
            options={**gptq, "weights": (1.0,) * 5, "zero_point": "midrange"},
        ),
        "gptq+ joint centre": Cell(
            what="nested, prefix, mid-range zero-points", options={**gptq, "zero_point": "midrange"}
        ),
        "gptq+ all": Cell(what="nested GPTQ, all layers", options={**gptq, "scope": "linears"}),
        "gptq+ all even centre": Cell(
            what="nested GPTQ, lambda 1, mid-range zero-points, all layers",
            options={**gptq, "scope": "linears", "weights": (1.0,) * 5, "zero_point": "midrange"},
            models=STORIES,
        ),
        "gptq+ all 128": Cell(
            what="nested GPTQ, all layers, groups of 128",
            options={**gptq, "scope": "linears", "group_size": 128, "affine": "none"},
            models=("reference",),
        ),
        "gptq+ tuned": Cell(what="nested GPTQ, tuned", options={**gptq, **TUNED}, models=("reference",)),
        "gptq+ tuned all 128 centre": Cell(
            what="nested GPTQ, tuned, all layers, groups of 128, mid-range zero-points",
            options={**gptq, **TUNED, "scope": "linears", "group_size": 128, "zero_point": "midrange"},
            models=("reference",),
        ),
        "gptq+ tuned all centre": Cell(
            what="nested GPTQ, tuned, all layers, mid-range zero-points",
            options={**gptq, "tune": TUNED["tune"], "scope": "linears", "zero_point": "midrange"},
            models=STORIES,
        ),
        "gptq+ joint no sweep": Cell(what="nested, prefix, without the sweep", options={**gptq, "sweeps": 0}),
    }
    return cells


FOUR = (1.0, 1.0, 1.0, 1.0)
STEADY = (1e-3, 3e-3, 1e-2)
CLIPPED: dict[int, tuple[float, ...]] = {
    **dict.fromkeys((8, 6, 4), STEADY),
    **dict.fromkeys((3, 2), (*STEADY, 3e-2, 1e-1)),
}
BEST: Options = {
    "method": "qat",
    "affine": "learned",
    "objective": "8,4,3,2,fp->8;4;3;2",
    "weights": FOUR,
    "masters": "each",
    "pull": 0.5,
    "wide_lr": 0.5,
    "start": "gptq+ joint",
}
PLANS: Options = {"zero_point": "midrange", "mix": 2.0, "hidden": 1.0}


EVENLY: Options = {**BEST, "start": "gptq+ joint even"}
EVERY: Options = {"objective": "8,6,4,3,2,fp->8;6;4;3;2", "weights": (1.0,) * 5}
FREED: Options = {**EVERY, "freeze": 2, "wide_lr": 0.25}  # the bits below int2's and all per-width scales
LAST: Options = {**EVERY, "freeze": 4, "wide_lr": 1.0, "affine_lr": 10.0}  # the last phase, whatever it starts from


def _from_gptq() -> dict[str, Cell]:
    """Dedicated models that start from a dedicated GPTQ pass, and ours on all layers."""
    own: Options = {"method": "qat", "affine": "learned"}
    cells = {}
    for bits in (4, 3, 2):
        start = {**own, "baseline_bits": bits, "start": f"gptq+ int{bits}"}
        cells[f"qat+start int{bits}"] = Cell(
            what=f"dedicated int{bits} from GPTQ, {bits},fp->{bits}",
            options={**start, "objective": f"{bits},fp->{bits}"},
            rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
        )
    for bits, rates in {3: (2e-3, 1e-3, 4e-3, 5e-4), 2: (2e-3, 1e-3, 4e-3)}.items():
        start = {**own, "baseline_bits": bits, "start": f"gptq+ int{bits}"}
        cells[f"qat+distilled int{bits}"] = Cell(
            what=f"dedicated int{bits} from GPTQ, fp->{bits}, hidden states",
            options={**start, "objective": f"fp->{bits}", "hidden": 1.0},
            rates=rates,
            models=("reference",),
        )
    everything = {**BEST, "scope": "linears", "start": "gptq+ all"}
    last = {**everything, **LAST, "tokens": CALIBRATION, "steps": 64}
    centred = {**last, "start": "gptq+ tuned all 128 centre", "group_size": 128, "zero_point": "midrange"}
    distilled = {**everything, "objective": "fp->8;4;3;2", "hidden": 1.0, "tokens": CALIBRATION, "steps": 96}
    distilled |= {"zero_point": "midrange"}
    plans = {**everything, **PLANS, "mix": 3.0}
    return cells | {
        "qat+ all distilled": Cell(
            what="nested GPTQ, tuned, distilled on the peers' calibration text, mid-range zero-points, all layers",
            options={**distilled, "start": "gptq+ tuned all centre"},
            rates=(5e-4,),
            models=STORIES,
        ),
        "qat+ all distilled 128": Cell(
            what="... in groups of 128",
            options={**distilled, "start": "gptq+ tuned all 128 centre", "group_size": 128},
            rates=(5e-4,),
            models=("reference",),
        ),
        "qat+ all one-shot": Cell(
            what="nested GPTQ, tuned, distilled, then low bits and scales alone, mid-range zero-points, all layers",
            options={**last, "start": "qat+ all distilled", "zero_point": "midrange"},
            rates=(5e-5,),
            models=STORIES,
        ),
        "qat+ all one-shot 128": Cell(
            what="nested GPTQ, tuned, distilled, then low bits and scales alone, groups of 128, mid-range zero-points, "
            "all layers",
            options={**centred, "start": "qat+ all distilled 128"},
            rates=(5e-5,),
            models=("reference",),
        ),
        "distill trained 128": Cell(
            what="--method distill --freeze 2, 150 steps and 100, groups of 128, mid-range zero-points, all layers",
            options={
                "method": "distill",
                "scope": "linears",
                "group_size": 128,
                "zero_point": "midrange",
                "freeze": 2,
                "steps": 150,
            },
            models=("reference",),
        ),
        "qat+ all plans first": Cell(
            what="QAT from nested GPTQ, mid-range zero-points, --mix, --hidden, 600 steps, all layers",
            options={**plans, "start": "gptq+ all even centre", "affine_lr": 0.5, "steps": 600},
            rates=(1e-3,),
            models=STORIES,
            default=False,
        ),
        "qat+ all plans": Cell(
            what="QAT from nested GPTQ, mid-range zero-points, --mix, --hidden, 600 steps, then 300 in which int2 "
            "keeps its codes, all layers",
            options={**plans, **FREED, "start": "qat+ all plans first", "affine_lr": 0.625, "steps": 300},
            rates=(8e-4,),
            models=STORIES,
        ),
        "qat+ all last 128 centre": Cell(
            what="nested GPTQ, tuned, then low bits and scales alone, groups of 128, mid-range zero-points, all layers",
            options=centred,
            rates=(5e-5,),
            models=("reference",),
        ),
    }


CELLS: dict[str, Cell] = {
    "rtn": Cell(what="round to nearest, sliced (prefix)", options={"method": "rtn", **PLAIN}),
    "rtn round": Cell(what="round to nearest, sliced (Eq. 6)", options={"method": "rtn", **PLAIN, "rule": "round"}),
    "rtn refit": Cell(what="round to nearest, scales and zero-points refitted", options={"method": "rtn"}),
    **_one_pass(),
    **_matrix(),
    **_ours("omniquant", {"objective": "8,4,3,2", "weights": FOUR}, STEADY, CLIPPED),
    "omniquant+ joint gptq": Cell(
        what="one nested checkpoint, 8,6,4,3,2, codes by nested GPTQ",
        options={
            "method": "omniquant",
            "affine": "learned",
            "objective": "8,6,4,3,2",
            "weights": (4.0, 2.5, 1.6, 1.25, 1.0),
            "codes": "gptq",
        },
        rates=STEADY,
    ),
    **_ours("qat", BEST, (5e-4, 7e-4, 1e-3), WARM),
    "qat+ joint companded": Cell(
        what="... on the companded grid",
        options={**BEST, "start": "gptq+ joint companded", "grid": "companded"},
        rates=(5e-4,),
    ),
    "qat+ joint even": Cell(
        what="... from nested GPTQ with lambda 1",
        options=EVENLY,
        rates=(5e-4,),
    ),
    "qat+ joint even mix": Cell(
        what="... from nested GPTQ with lambda 1, with --mix",
        options={**BEST, "start": "gptq+ joint even", "mix": 2.0},
        rates=(5e-4,),
    ),
    "qat+ joint mix": Cell(what="... with --mix", options={**BEST, "mix": 2.0}, rates=(5e-4,)),
    "qat+ joint even centre": Cell(
        what="... from nested GPTQ with lambda 1, mid-range zero-points",
        options={**BEST, "start": "gptq+ joint even centre", "zero_point": "midrange"},
        rates=(5e-4,),
    ),
    "qat+ joint even plans": Cell(
        what="... from nested GPTQ with lambda 1, mid-range zero-points, with --mix and --hidden, 900 steps",
        options={
            **BEST,
            **PLANS,
            "start": "gptq+ joint even centre",
            "mix": 3.0,
            "steps": 900,
        },
        rates=(5e-4,),
    ),
    "qat+ joint plans": Cell(
        what="... mid-range zero-points, with --mix and --hidden",
        options={**BEST, **PLANS, "start": "gptq+ joint centre"},
        rates=(5e-4,),
    ),
    **_from_gptq(),
}

app = typer.Typer(add_completion=False)


@app.command()
def cells() -> None:
    """List the cells."""
    for name, cell in CELLS.items():
        print(f"{name:28} {cell.what}")


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="stories260K or reference.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="CELL...", help="Cells to run; default those of the results.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Order of the data; after 0, at the rate that 0 chose.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; part of what makes runs repeat bit for bit.")] = 1,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the checkpoint that experiments/plan.py makes where it looks for it.")
    ] = False,
) -> None:
    """Run the cells that have no record yet."""
    torch.set_num_threads(threads)
    streams = held_out(model)
    for name in names or [name for name, cell in CELLS.items() if cell.default and model in cell.models]:
        made = [record for record in records() if (record["model"], record["cell"]) == (model, name)]
        if seed and not any(record["seed"] == 0 for record in made):
            raise typer.BadParameter(f"{name!r} has no record of {model} with seed 0, whose rate it would take")
        first = chosen(made) if seed else {}
        more = {key: value for key, value in first.get("options", {}).items() if key == "autocast"}
        for lr in CELLS[name].rates if seed == 0 else (first["lr"],):
            if not any((record["lr"], record["seed"]) == (lr, seed) for record in made):
                kept = keep and (lr, seed) == (CELLS[name].rates[0], 0)
                record = _measure(model, name, lr, seed, streams, more=more, keep=kept)
                with RECORDS.open("a") as file:
                    file.write(json.dumps(record, sort_keys=True) + "\n")
                print(json.dumps(record, sort_keys=True), flush=True)


def records() -> list[dict[str, Any]]:
    """All records, in the order they were made."""
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.is_file() else []


def chosen(made: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The record of seed 0, among those of one cell, whose learning rate is best on the SELECT tokens."""
    return min((record for record in made if record["seed"] == 0), key=lambda record: record["select"] or 0)


def held_out(model: str) -> Streams:
    """The TEST and SELECT tokens of a model."""
    setting = SETTINGS[model]
    documents = read_documents([setting.held_out])[setting.skip : setting.skip + 800]
    stream = token_stream(documents, load_tokenizer(setting.path))
    test = TEST[model]
    return stream[: test + 1], stream[test : test + SELECT[model] + 1]


def float_log_perplexity(model: str) -> float:
    """Of the float model on the TEST tokens."""
    return log_perplexity(load_float(SETTINGS[model].path, dtype=torch.float32), held_out(model)[0], context=CONTEXT)


def make(model: str, name: str, lr: float | None, seed: int, out: Path, *, more: Options | None = None) -> Path:
    """Write the checkpoint of a cell to ``out``; beside it may lie what it starts from. more: options over its own."""
    setting, text = SETTINGS[model], [SETTINGS[model].text]
    options = _options(model, name, lr, seed, more or {})
    text = text if options["method"] != "rtn" else []
    if "tokens" in options:  # of the text, whole documents
        text = [_beginning(setting, options.pop("tokens"), out.parent / "text.txt")]
    return _quantize(model, options, seed, text, out)


def _quantize(model: str, options: Options, seed: int, text: list[Path], out: Path) -> Path:
    """Write ``out``, and first what it starts from: another cell, at its first rate and of the same text and seed."""
    if "start" in options:
        first = _options(model, options["start"], CELLS[options["start"]].rates[0], seed, {})
        first.pop("tokens", None)
        options = {**options, "start": _quantize(model, first, seed, text, out.parent / f"{out.name}-first")}
    return matquant.quantize(SETTINGS[model].path, out, text=text, overwrite=True, **options)


def _options(model: str, name: str, lr: float | None, seed: int, more: Options) -> Options:
    """Those of the paper's setting, over them the model's, the cell's own and ``more``."""
    own = {**FFN, **CELLS[name].options}
    method = own["method"]
    options = {**SETTINGS[model].training.get(method, {}), **({"seed": seed} if method != "rtn" else {})}
    return {**options, **({"lr": lr} if lr is not None else {}), **own, **more}


def kept_at(model: str, name: str) -> Path:
    """Where the checkpoint of a cell is kept."""
    return CACHE / model / name.replace(" ", "-")


def _measure(
    model: str, name: str, lr: float | None, seed: int, streams: Streams, *, more: Options, keep: bool = False
) -> dict[str, Any]:
    options = _options(model, name, lr, seed, more)
    began, cpu_s = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        out = make(model, name, lr, seed, Path(folder) / "out", more=more)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_s
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        checkpoint = open_checkpoint(out)
        served = matquant.load(out, dtype=torch.float32, kernels="none", device=DEVICE)
        baseline = options.get("baseline_bits", 8)
        widths = (baseline,) if baseline < 8 else WIDTHS
        sizes = {str(b): bits_per_weight(checkpoint, dict.fromkeys(checkpoint.shapes, b)) for b in widths}
        if keep:
            shutil.copytree(out, kept_at(model, name), dirs_exist_ok=True)
    test = evaluate(served, streams[0], bits=widths, context=CONTEXT)
    spec = checkpoint.spec
    select = evaluate(served, streams[1], bits=spec.widths, context=CONTEXT) if lr is not None else {}
    return {
        "model": model,
        "cell": name,
        "lr": lr,
        "seed": seed,
        "options": options,
        "log_perplexity": test,
        "select": sum(w * select[str(b)] for b, w in zip(spec.widths, spec.weights, strict=True)) if select else None,
        "bits_per_weight": sizes,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_s, 1),
        "peak_bytes": peak_bytes,  # resident, of this process so far: of the cell if it ran alone
        **origin("torch", "transformers", "numpy"),
        **({"device": torch.cuda.get_device_name()} if DEVICE == "cuda" else {}),
    }


def _beginning(setting: Setting, tokens: int, file: Path) -> Path:
    """``file`` with the first documents of the training text, of at least so many tokens together."""
    documents, tokenizer = read_documents([setting.text]), load_tokenizer(setting.path)
    counts = np.cumsum([len(token_stream([document], tokenizer)) for document in documents])
    file.write_text("<|endoftext|>".join(documents[: int(np.searchsorted(counts, tokens + 1)) + 1]), encoding="utf-8")
    return file


if __name__ == "__main__":
    app()
