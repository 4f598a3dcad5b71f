"""Recipes: the one choice that a newcomer has to make. A recipe is a method with options, its cost and its quality.

Measured on SmolLM2-135M-Instruct (106 million weights in 210 linear layers, 28 million in its tied embedding and head;
groups of 64) with the calibration text that comes with matquant: CPU time of one core, peak memory, and perplexity on
8,192 tokens of wikitext-2 at int8, int6, int4, int3 and int2, embedding and head at int6 or wider; the float model has
29.37. docs/results.md has the commands. ``paper`` trained on 1.3 MB of C4, and quantises the feed-forward layers alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matquant.core.nest import UNIFORM
from matquant.options import METHODS
from matquant.options.common import MIDRANGE, Common
from matquant.options.declare import options_of
from matquant.system.errors import InputError

DEFAULT = "balanced"
WIDTHS = (8, 6, 4, 3, 2)  # at which recipes were measured
# Loss weights of int8, 6, 5, 4, 3 and 2 in GPTQ: better int8 to int4 than gptq's default, worse int3 and int2
# (docs/methods.md, experiments/log.md).
WIDE = (112.0, 28.0, 3.0, 7.0, 3.2, 1.05)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A row of RECIPES."""

    method: str  # a name in METHODS
    options: Mapping[str, Any]  # what differs from the defaults
    why: str  # when to take it
    cost: str  # measured as above
    perplexity: tuple[str, ...]  # at int8, int6, int4, int3 and int2, measured as above


RECIPES: dict[str, Recipe] = {
    "fast": Recipe(
        method="rtn",
        options={},
        why="seconds, no text; for int8 and int6; int4 and below lose quality",
        cost="9 s, 0.9 GB",
        perplexity=("29.33", "30.11", "43.1", "216", "634,000"),
    ),
    "balanced": Recipe(
        method="gptq",
        options={
            "zero_point": MIDRANGE,
            "grid": "companded",
            "weights": WIDE,
            "sweeps": 4,
            "seq_len": 512,
        },
        why="one calibrated pass: good int8 to int4 without training",
        cost="17 min, 1.2 GB",
        perplexity=("29.52", "29.79", "33.77", "60.1", "1,354"),
    ),
    "best": Recipe(
        method="distill",
        options={
            "zero_point": MIDRANGE,
            "grid": "companded",
            "gptq_weights": WIDE,
            "sweeps": 4,
            "tune": 0,  # not tried on a model of this size
            "steps": 40,
            "lr": 2e-4,  # the only one tried: few steps, so twice the method's
            "batch_size": 4,  # twice 4 sequences at once: half the memory of 8
            "accumulate": 2,
            "freeze": 0,  # no last phase: not measured on this model
            "trained_widths": (8, 5, 4, 3, 2),  # int5 has 0.78 of the KL divergence, others differ by 1 % at most
        },
        why="GPTQ, then a short distillation from the float model: closer to it than balanced at every width",
        cost="91 min, 12.8 GB",
        perplexity=("29.54", "29.78", "32.34", "44.4", "191"),
    ),
    "paper": Recipe(
        method="qat",
        options={
            "objective": "8,4,2",
            "weights": (0.1, 0.1, 1.0),
            "rule": "round",
            "scope": "ffn",
            "group_size": None,
            "steps": 150,  # of 8 sequences of 256 tokens; the paper takes 100 million tokens
        },
        why="the paper's joint training of the feed-forward layers (Eq. 6 and 7), for comparison; needs a corpus",
        cost="81 min, 7 GB",
        perplexity=("27.92", "28.55", "33.67", "234", "1,421"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The method that runs, and its options."""

    recipe: str | None  # None where a method was named instead
    method: str
    common: Common  # the options of every method
    options: Mapping[str, Any]  # the method's options that differ from its defaults
    named: frozenset[str]  # the options given by the user, not by the recipe


def choose(given: Mapping[str, Any], *, recipe: str | None = None, method: str | None = None) -> Choice:
    """Merge the given options over the recipe's; InputError for options that are unknown or belong to another method.

    given: options by name. A named method is used without a recipe, with its own defaults.
    """
    if recipe is not None and recipe not in RECIPES:
        raise InputError(f"recipe={recipe!r} is not known; use one of {', '.join(RECIPES)}")
    if method is not None and method not in METHODS:
        raise InputError(f"method={method!r} is not known; use one of {', '.join(METHODS)}")
    if recipe is not None and method not in (None, RECIPES[recipe].method):
        raise InputError(
            f"--recipe {recipe} runs method {RECIPES[recipe].method!r}, found --method {method}; drop one of them"
        )
    name = recipe or (DEFAULT if method is None else None)
    base = RECIPES[name] if name is not None else None
    asked = {**(base.options if base else {}), **given}
    chosen = base.method if base else str(method)
    shared = options_of(Common)
    common = {key: value for key, value in asked.items() if key in shared}
    if asked.get("portable"):
        common["grid"] = _portable(given)
    return Choice(
        recipe=name,
        method=chosen,
        common=Common(**common),
        options={key: value for key, value in asked.items() if key not in shared},
        named=frozenset(given),
    )


def _portable(given: Mapping[str, Any]) -> str:
    if given.get("grid", UNIFORM) != UNIFORM:
        raise InputError(f"--portable needs the uniform grid, found --grid {given['grid']}; drop one of them")
    return UNIFORM
