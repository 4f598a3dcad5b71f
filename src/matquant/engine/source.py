"""The directory that an engine reads more planes from while it runs."""

import threading

from matquant.core.nest import MASTER_BITS
from matquant.format.manifest import fetch_words, is_weights, read_manifest
from matquant.format.plane_files import planes_read
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.system.errors import InputError


class Source:
    """A checkpoint's directory. alone: held by the thread that changes which planes are in memory."""

    def __init__(self, checkpoint: Checkpoint, *, check_hashes: bool) -> None:
        self.directory = checkpoint.directory
        self.alone = threading.Lock()
        self._check_hashes = check_hashes
        self._mmap = checkpoint.mmap
        self._is_partial = checkpoint.max_bits < MASTER_BITS
        self._weights = self._listed_weights()

    def open(self, *, held_bits: int) -> Checkpoint:
        """Open the directory again; planes that widths above ``held_bits`` read are compared with their hashes.

        InputError if a file is damaged, or the weights are not those that were opened first.
        """
        if self._listed_weights() != self._weights:
            raise InputError(f"{self.directory} holds another checkpoint than this engine; open it again")
        checkpoint = open_checkpoint(
            self.directory, check_hashes=False, check_sizes=True, mmap=self._mmap, partial=True
        )
        if checkpoint.planes is not None and self._check_hashes:
            checkpoint.planes.check(first=planes_read(held_bits, checkpoint.spec.rule), hashes=True)
        return checkpoint

    def hint(self, bits: int) -> str:
        """Return how to get planes that were not there when the directory was opened; "" if all of them were."""
        return fetch_words(self.directory, bits=bits) if self._is_partial else ""

    def _listed_weights(self) -> dict[str, str]:
        """Return the sha256 of every file with weights, by name."""
        entries = read_manifest(self.directory)["files"]
        return {name: entry["sha256"] for name, entry in entries.items() if is_weights(name)}
