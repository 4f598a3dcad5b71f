"""Put a checkpoint on the hub: the stock int8 model, a model card, and its planes if they are wanted.

Only what the manifest lists is uploaded, beside README.md and licences, in one commit: readers see the old checkpoint
or the new one. Files of an earlier checkpoint in the same repository are deleted by that commit.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matquant.export.card import nested_card, read_evaluation
from matquant.format.manifest import FOLDER, INDEX, MANIFEST, read_manifest
from matquant.format.plane_write import shards_of, write_planes
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.hf.hub import Repository, check_name, commit_files, make_repository
from matquant.system.errors import InputError
from matquant.system.files import check_space

CARD = "README.md"
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
OURS = "matquant_"  # how names of our own files begin
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def push(
    directory: Path | str,
    repo: str,
    *,
    planes: bool = False,
    private: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
    measured: Path | None = None,
) -> dict[str, Any]:
    """Upload a checkpoint to the model repository USER/REPO, which is made if there is none.

    planes: upload its planes too, from which ``matquant pull --bits`` fetches what a width needs; they take as much
    space again. private: of a new repository. revision: branch to commit to (None: main). base_model, measured: hub id
    of the float model and a record of ``matquant eval --json``, for the model card; a README.md in ``directory`` is
    used as it is. Returns {"url": of the commit, "files": number, "bytes": of all files, "deleted": names}.
    InputError for a checkpoint that is damaged or not whole, and for a hub that does not accept it; then the repository
    is as before.
    """
    check_name(repo)
    checkpoint = open_checkpoint(directory)
    if checkpoint.planes is not None:
        raise InputError(f"{directory} holds planes; make the shards first with: matquant assemble {directory}")
    evaluation = read_evaluation(measured, checkpoint)
    repository = make_repository(repo, private=private, revision=revision)
    with _planes(checkpoint, wanted=planes) as parts:
        files: dict[str, Path | bytes] = {**_listed(checkpoint), **parts}
        if CARD not in files:
            card = nested_card(checkpoint, name=repo, base_model=base_model, measured=evaluation, has_planes=planes)
            files[CARD] = card.encode()
        gone = _left_over(repository, set(files))
        message = f"Upload a matquant checkpoint{' and its planes' if planes else ''}"
        total = sum(map(_size, files.values()))
        url = commit_files(repo, files, delete=gone, revision=revision, message=message)
    return {"url": url, "files": len(files), "bytes": total, "deleted": gone}


def _listed(checkpoint: Checkpoint) -> dict[str, Path | bytes]:
    """Return the files of a checkpoint by name, with its card and licences if there are any."""
    where = checkpoint.directory
    extra = [name for name in (CARD, *LICENCES) if (where / name).is_file()]
    return {name: where / name for name in [MANIFEST, *read_manifest(where)["files"], *extra]}


@contextlib.contextmanager
def _planes(checkpoint: Checkpoint, *, wanted: bool) -> Iterator[dict[str, Path]]:
    """Yield the planes of a checkpoint, path in the repository -> file; they are deleted afterwards."""
    if not wanted:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="matquant-") as folder:
        shards = shards_of(checkpoint)
        check_space(Path(folder), sum((checkpoint.directory / name).stat().st_size for name in shards))
        write_planes(checkpoint, Path(folder))
        yield {f"{FOLDER}/{file.name}": file for file in sorted((Path(folder) / FOLDER).iterdir())}


def _left_over(repository: Repository, new: set[str]) -> list[str]:
    """Return the files of an earlier checkpoint in a repository that the new one does not replace."""
    return sorted(
        name
        for name in repository.files - new
        if name.startswith((f"{FOLDER}/", OURS)) or name == INDEX or SHARD.fullmatch(name)
    )


def _size(data: Path | bytes) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size
