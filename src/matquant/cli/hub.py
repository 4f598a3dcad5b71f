"""``matquant push``, ``matquant pull`` and ``matquant assemble``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matquant.cli.arguments import BaseModel, Directory, Measured, Option, notice
from matquant.format.plane_write import assemble as assemble_planes
from matquant.system import progress
from matquant.system.lazy import lazy

if TYPE_CHECKING:
    from matquant.hub import pull as pulling
    from matquant.hub import push as pushing
else:
    pulling, pushing = lazy("matquant.hub.pull"), lazy("matquant.hub.push")

Repo = Annotated[str, typer.Argument(metavar="USER/REPO", help="A model repository on the Hugging Face hub.")]


def push(
    directory: Directory,
    repo: Repo,
    planes: Annotated[
        bool, Option("--planes", help="Upload the planes too, so that others can pull int2 first; twice the storage.")
    ] = False,
    private: Annotated[bool, Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, Option(metavar="BRANCH", help="Branch to commit to.", show_default="main")] = None,
    base_model: BaseModel = None,
    measured: Measured = None,
) -> None:
    """Upload a checkpoint to the Hugging Face hub, in one commit."""
    made = pushing.push(
        directory,
        repo,
        planes=planes,
        private=private,
        revision=revision,
        base_model=base_model,
        measured=measured,
    )
    if made["deleted"]:
        notice(f"deleted {len(made['deleted'])} files of the checkpoint before: {', '.join(made['deleted'])}")
    print(f"pushed {made['files']} files, {made['bytes'] / 1e6:,.1f} MB, to {repo}: {made['url']}")


def pull(
    repo: Repo,
    out: Annotated[Path, Option("--out", "-o", metavar="DIR", help="Directory to fetch into, or to refine.")],
    bits: Annotated[int, Option(help="Fetch what widths up to this one need; more can be fetched later.")] = 8,
    revision: Annotated[
        str | None,
        Option(metavar="REV", help="Branch, tag or commit of the first pull; later ones stay at its commit."),
    ] = None,
) -> None:
    """Fetch a checkpoint from the Hugging Face hub: the bits that a width needs, or those that are still missing."""
    with progress.transferring("pull", "received") as report:
        made = pulling.pull(repo, out, bits=bits, revision=revision, report=report, notice=notice)
    print(f"{out} serves int{made['max_bits']} and narrower; received {made['bytes'] / 1e6:,.1f} MB")


def assemble(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory with all planes.")]) -> None:
    """Make the stock int8 checkpoint of its planes, byte for byte, in place."""
    made = assemble_planes(directory)
    print(f"{directory} is a stock checkpoint again: {', '.join(made) or 'planes deleted'}")
