"""``matquant quantize``, with the options that options/ declares."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

import typer

from matquant.options import METHODS, declared_options
from matquant.options.declare import BASICS, OBJECTIVE, Option
from matquant.options.recipes import DEFAULT, RECIPES
from matquant.options.request import check_request
from matquant.system import progress, ranks
from matquant.system.lazy import lazy
from matquant.system.startup import INTERRUPTED, keep_freed_memory

if TYPE_CHECKING:
    from matquant.methods import preview
    from matquant.methods import quantize as quantising
else:
    preview, quantising = lazy("matquant.methods.preview"), lazy("matquant.methods.quantize")

SIMPLE = (int, float, bool, str)


def quantize(model: str, out: Path, *, dry_run: bool, **given: Any) -> None:
    """Make one nested checkpoint of a float model."""
    parse = {option.name: option.declared.parse for option, _ in declared_options()}
    options: dict[str, Any] = {}
    for name, value in given.items():
        if value is not None and value != []:
            reader = parse.get(name)
            options[name] = reader(value) if reader else value
    request = check_request(model, out, **options)  # before torch is imported
    with _resumable():
        if dry_run:
            if ranks.leads():
                print("\n".join(preview.preview(model, request)))
            return
        keep_freed_memory()
        with progress.quantising() as report:
            written = quantising.run(model, request, report=report, announce=lambda lines: report({"settings": lines}))
    if ranks.leads():
        print(f"wrote {written}; try: matquant eval {written} --text FILE")


def _signature() -> inspect.Signature:
    """Return the parameters of the command: MODEL, OUT, the recipe, the method, and every declared option."""
    methods = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    recipes = "; ".join(f"{name}: {recipe.why}" for name, recipe in RECIPES.items())
    fixed: dict[str, Any] = {
        "model": Annotated[
            str, typer.Argument(metavar="MODEL", help="Float model: a Hugging Face directory, a GGUF file or a hub id.")
        ],
        "out": Annotated[
            Path, typer.Option("--out", "-o", metavar="OUT", help="Directory to write.", rich_help_panel=BASICS)
        ],
        "recipe": Annotated[str | None, typer.Option(help=f"{recipes}.", show_default=DEFAULT, rich_help_panel=BASICS)],
        "dry_run": Annotated[
            bool,
            typer.Option(
                "--dry-run",
                help="Print the settings, with estimated time and memory, and stop.",
                rich_help_panel=BASICS,
            ),
        ],
        "method": Annotated[
            str | None,
            typer.Option(help=f"{methods}.", show_default="the recipe's", rich_help_panel=OBJECTIVE),
        ],
    }
    defaults = {"dry_run": False, "recipe": None, "method": None}
    parameters = [_parameter(name, kind, defaults.get(name, inspect.Parameter.empty)) for name, kind in fixed.items()]
    for option, shown in declared_options():
        parameters.append(_parameter(option.name, _annotation(option, shown), None))
    return inspect.Signature(parameters)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(option: Option, shown: str) -> Any:
    """Return typer's annotation of an option; None means that it was not given."""
    declared = option.declared
    return Annotated[
        _command_line_type(option) | None,
        typer.Option(
            option.flags,
            help=declared.help,
            metavar=declared.metavar or ("|".join(declared.choices) or None),
            show_default=shown or False,
            rich_help_panel=declared.panel,
        ),
    ]


def _command_line_type(option: Option) -> Any:
    """Return typer's type: a list for repeated options, text for options that we parse or with several types."""
    if option.declared.parse is not None:
        return str
    kinds = [kind for kind in _members(option.type) if kind is not type(None)]
    if any(get_origin(kind) is Sequence for kind in kinds):
        return list[Path] if Path in _members(get_args(kinds[0])[0]) else list[str]
    return kinds[0] if len(kinds) == 1 and kinds[0] in SIMPLE else Path if Path in kinds else str


def _members(kind: Any) -> Sequence[Any]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


@contextmanager
def _resumable() -> Iterator[None]:
    """Exit with code 130 on Ctrl-C, and say how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        print(
            "interrupted; to continue a run that had begun its work, repeat the command with --resume", file=sys.stderr
        )
        raise typer.Exit(INTERRUPTED) from None


quantize.__signature__ = _signature()  # type: ignore[attr-defined]
quantize.__annotations__ = {name: one.annotation for name, one in inspect.signature(quantize).parameters.items()}
