"""The verbs of the command line, as a table: only the module of the verb in use is imported."""

import importlib
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from matquant.system import ranks
from matquant.system.startup import leave_on_interrupt

VERBS = {  # verb -> its module, its function there, its line in --help
    "quantize": ("quantize", "quantize", "Make one nested checkpoint of a float model."),
    "eval": ("evaluate", "evaluate", "Measure log-perplexity and zero-shot accuracy at every width."),
    "plan": ("plan", "plan", "Choose a width for each layer to fit a budget."),
    "report": ("report", "report", "Write one HTML page: which width to choose, and what each costs."),
    "inspect": ("inspect", "inspect_checkpoint", "Show widths, sizes, bits per weight and histograms of a checkpoint."),
    "verify": ("verify", "verify", "Check every hash, shape, number and token of a checkpoint."),
    "generate": ("generate", "generate", "Continue a text at any width, streaming. Needs no torch."),
    "chat": ("generate", "chat", "Talk to a model; /bits 2 switches the width between replies, /quit ends."),
    "serve": ("serve", "serve", "Serve a checkpoint at every width through OpenAI's API. Needs no torch."),
    "bench": ("bench", "bench", "Measure tokens per second at every width."),
    "export": ("export", "export", "Write a slice for llama.cpp, MLX, vLLM, transformers or GPTQModel."),
    "push": ("hub", "push", "Upload a checkpoint to the Hugging Face hub."),
    "pull": ("hub", "pull", "Fetch a checkpoint from the hub: int2 first, the other bits later."),
    "assemble": ("hub", "assemble", "Make the stock checkpoint of its planes, byte for byte."),
    "demo": ("demo", "demo", "Quantise the embedded model and compare it with its baselines."),
}
SHARED = ("quantize", "eval")  # verbs that several processes can share
NOT_LISTED = {"assemble"}  # matquant pull does it; for directories that were copied


class Verbs(TyperGroup):
    """A group that imports a command only when it runs; listing commands needs only the table."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [verb for verb in VERBS if verb not in NOT_LISTED]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=VERBS[cmd_name][2]) if cmd_name in VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in SHARED:
            ranks.share()
        else:
            ranks.check_single(f"matquant {name}")
        return name, command and load(str(name)), rest


def load(verb: str) -> Any:
    """Return the click command of a verb."""
    name, function, line = VERBS[verb]
    with leave_on_interrupt():
        module = importlib.import_module(f"matquant.cli.{name}")
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=CONTEXT)
    single.command(verb, help=line)(getattr(module, function))
    return get_command(single)


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 140}
app = typer.Typer(
    cls=Verbs,
    help="One int8 checkpoint whose top bits are good int4 and int2 models (Matryoshka Quantization).",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings=CONTEXT,
)


@app.callback()
def _no_options() -> None:
    """Declare that the group itself takes no options."""
