"""Experts in a budget of memory: all keep their top bits, and the busiest get more from the checkpoint while steps run.

    engine = matquant.Engine("OUT", resident="2GB")

A step reads an expert at the requested width, or at the widest that is in memory: at int2 or wider, always from the
expert's own codes. No step waits for the disk: a thread reads and packs planes, and they are put to use between two
steps. Planes are freed before others are read, so the weights never exceed the budget. worth.py says which planes.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from matquant import _native
from matquant.core.nest import MASTER_BITS, bits_read, check_bits
from matquant.core.planes import add_planes, hold, planes_bytes
from matquant.engine.model import Model, load_model
from matquant.engine.worth import Levels, Sizes, exchange, wanted
from matquant.format.read import Checkpoint
from matquant.format.sizes import plain_bytes
from matquant.system.arguments import check_given, read_size
from matquant.system.errors import InputError

FLOOR_BITS = 2  # width that every expert keeps
HALF_LIFE_STEPS = 512  # after which a count of tokens is worth half
PERIOD_STEPS = 16  # between two looks at the counts
SWAP_BYTES = 2**26  # read at once at most, unless a single plane is larger
SWAP_BYTES_S = 2**28  # read in a second at most


class Swap(NamedTuple):
    """After step ``step`` (the first is 1) the planes of an expert that ``bits`` bits need are in memory, no others."""

    step: int
    layer: int
    expert: int
    bits: int


class Residency:
    """Which planes of experts are in memory. The engine calls it from one thread at a time.

    budget_bytes: most bytes of weights. least_bytes: of weights with all experts at the narrowest width. widths: those
    of the levels (worth.py). swaps: done so far. failure: why planes could not be read; then there are no more swaps.
    """

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        *,
        budget_bytes: int,
        max_bits: int,
        swaps: Iterable[Sequence[int]] | None,
    ) -> None:
        rule = checkpoint.spec.rule
        self.budget_bytes = budget_bytes
        self.widths = levels_up_to(max_bits, rule=rule)
        self.step = self.swap_bytes = 0
        self._tokens_by_width = np.zeros(MASTER_BITS + 1, np.int64)
        self.swaps: list[Swap] = []
        self.failure: str | None = None
        self._checkpoint = checkpoint
        self._paths: dict[tuple[int, int], list[str]] = {}  # (layer, expert) -> its matrices, in native order
        for path in model.shares:
            if path not in model.weights:
                raise InputError(
                    f"resident needs a model with all experts quantised, and {path} of {checkpoint.directory} is not; "
                    "leave it out"
                )
            parts = path.split(".")
            self._paths.setdefault((int(parts[2]), int(parts[-2])), []).append(path)
        self._places = list(self._paths)
        self._numbers = {place: number for number, place in enumerate(self._places)}
        shapes = [checkpoint.shapes[path] for path in self._paths[self._places[0]]]
        read = [bits_read(bits, rule=rule) for bits in self.widths]
        bytes_P = np.diff([sum(planes_bytes(*shape, bits=bits) for shape in shapes) for bits in read])
        self._sizes = Sizes(bytes_P=bytes_P, gains_P=-np.diff(4.0 ** -np.array(read)) / bytes_P)
        self._levels_E = np.zeros(len(self._places), np.int64)
        self._used_E = np.ones(len(self._places))
        self.least_bytes = plain_bytes(checkpoint) + sum(weight.planes.bytes for weight in model.weights.values())
        self._allowed_bytes, self._allowed_at = 0.0, time.monotonic()
        self._reader: threading.Thread | None = None
        self._read: Levels = {}
        self._replayed = None if swaps is None else [_read_swap(entry) for entry in swaps]
        _check_budget(checkpoint, budget_bytes, self.least_bytes)

    def start(self, model: Model) -> Model:
        """Return the model with as many planes as the budget holds, given to all experts alike."""
        model.native.narrow([number for number, path in enumerate(model.paths) if path in model.shares])
        levels_E = wanted(self._used_E, self._levels_E, self._sizes, room=self._room)
        levels = {int(expert): int(levels_E[expert]) for expert in np.flatnonzero(levels_E)}
        self._add(model, levels)
        model = self._hold(model, levels)
        self._check_replayed(self._replayed or [])
        return model

    def after(self, model: Model, workspace: _native.Workspace) -> Model:
        """Note a step that has ended, and exchange planes if it is time; return the model."""
        self.step += 1
        self._count(workspace.used)
        if self._replayed is not None:
            return self._replay(model, self._replayed)
        if self._reader is not None:
            return model if self._reader.is_alive() else self._finish(model)
        if self.step % PERIOD_STEPS or self.failure is not None:
            return model
        return self._begin(model)

    def _count(self, used: np.ndarray) -> None:
        """Add up what a step used, uint32 [E, widths], and clear it."""
        cells = np.flatnonzero(used)
        experts, widths = np.divmod(cells, used.shape[1])
        tokens = used[experts, widths]
        np.add.at(self._used_E, experts, tokens)
        np.add.at(self._tokens_by_width, widths, tokens)
        used[experts, widths] = 0
        if self.step % PERIOD_STEPS == 0:
            self._used_E = 1 + (self._used_E - 1) * 0.5 ** (PERIOD_STEPS / HALF_LIFE_STEPS)

    @property
    def resident_bytes(self) -> int:
        """Return the bytes of all weights in memory, those of planes that are being read included."""
        levels_E = self._levels_E.copy()
        for expert, level in self._read.items():
            levels_E[expert] = level
        return self.least_bytes + self._sizes.total(levels_E)

    def stats(self) -> dict[str, float]:
        """Return bytes of weights in memory, and counts since the start: swaps, bytes read, and tokens by width.

        "expert_tokens/4" is how often an expert was read at int4: a token counts for each of its experts in each layer.
        """
        tokens = {f"expert_tokens/{bits}": int(count) for bits, count in enumerate(self._tokens_by_width) if count}
        return {
            "resident_bytes": self.resident_bytes,
            "expert_swaps": len(self.swaps),
            "expert_swap_bytes": self.swap_bytes,
            **tokens,
        }

    @property
    def _room(self) -> int:
        return self.budget_bytes - self.least_bytes

    def _begin(self, model: Model) -> Model:
        """Free the planes that make room for more valuable ones, and begin to read those."""
        now, most = time.monotonic(), max([SWAP_BYTES, *self._sizes.bytes_P])
        self._allowed_bytes = min(most, self._allowed_bytes + (now - self._allowed_at) * SWAP_BYTES_S)
        self._allowed_at = now
        down, up, read_bytes = exchange(
            self._used_E, self._levels_E, self._sizes, room=self._room, most=int(self._allowed_bytes)
        )
        self._allowed_bytes -= read_bytes
        model = self._adopt(model, down)
        if up:
            self._read = up
            self._reader = threading.Thread(target=self._run, args=(model, up), name="matquant-experts", daemon=True)
            self._reader.start()
        return model

    def _run(self, model: Model, levels: Levels) -> None:
        try:
            self._add(model, levels)
        except (InputError, OSError, MemoryError) as error:  # steps go on with what they have
            self.failure = f"{type(error).__name__}: {error}"

    def _finish(self, model: Model) -> Model:
        """Put the planes that were read to use; after a failure give them back."""
        levels, self._read, self._reader = self._read, {}, None
        if self.failure is not None:
            return self._hold(model, {expert: int(self._levels_E[expert]) for expert in levels})
        return self._adopt(model, levels)

    def _adopt(self, model: Model, levels: Levels) -> Model:
        """Return the model with these levels, and record the swaps."""
        before = self._sizes.total(self._levels_E)
        model = self._hold(model, levels)
        self.swap_bytes += max(0, self._sizes.total(self._levels_E) - before)
        self.swaps += [Swap(self.step, *self._places[expert], self.widths[level]) for expert, level in levels.items()]
        return model

    def _add(self, model: Model, levels: Levels) -> None:
        """Read and pack planes. Steps may run meanwhile, and see them after ``_hold``."""
        for expert, level in levels.items():
            for path in self._paths[self._places[expert]]:
                nested = self._checkpoint.nested(path, mapped=True)
                add_planes(model.weights[path], nested, max_bits=self.widths[level])

    def _hold(self, model: Model, levels: Levels) -> Model:
        """Return the model with these levels, between two steps. Planes above them are given back."""
        if not levels:
            return model
        weights = dict(model.weights)

        def change() -> None:
            for expert, level in levels.items():
                for path in self._paths[self._places[expert]]:
                    weights[path] = hold(weights[path], max_bits=self.widths[level])
                self._levels_E[expert] = level

        model.native.change_weights(change)
        return replace(model, weights=weights)

    def _replay(self, model: Model, swaps: Sequence[Swap]) -> Model:
        while len(self.swaps) < len(swaps) and swaps[len(self.swaps)].step == self.step:
            swap = swaps[len(self.swaps)]
            levels = {self._numbers[swap.layer, swap.expert]: self.widths.index(swap.bits)}
            self._add(model, levels)
            model = self._adopt(model, levels)
        return model

    def _check_replayed(self, swaps: Sequence[Swap]) -> None:
        """Raise InputError for swaps that another model made, or one with a larger budget."""
        levels_E, last = self._levels_E.copy(), 1
        for swap in swaps:
            if (swap.layer, swap.expert) not in self._numbers or swap.bits not in self.widths or swap.step < last:
                raise InputError(f"{swap} does not fit {self._checkpoint.directory}; replay swaps of this checkpoint")
            levels_E[self._numbers[swap.layer, swap.expert]], last = self.widths.index(swap.bits), swap.step
            if self._sizes.total(levels_E) > self._room:
                raise InputError(
                    f"{swap} exceeds resident={self.budget_bytes} bytes; use the budget that it was recorded with"
                )


def load_within(
    resident: str | int | None, checkpoint: Checkpoint, *, max_bits: int, swaps: Iterable[Sequence[int]] | None
) -> tuple[Model, Residency | None]:
    """Load a model with at most ``resident`` bytes of weights ("2GB", or a number); None: all planes up to max_bits.

    swaps: those of an earlier run, to be done at the same steps in place of new ones; None: new ones. InputError if
    the experts do not fit at int2 beside the other weights, or the swaps are of another model or budget.
    """
    check_given(resident=resident)
    if resident is None:
        if swaps is not None:
            raise InputError("swaps are replayed within the budget of their run; give resident as well")
        return load_model(checkpoint, max_bits=max_bits), None
    budget_bytes = _read_budget(resident, checkpoint, max_bits=max_bits)
    model = load_model(checkpoint, max_bits=max_bits, expert_bits=_floor(max_bits))
    residency = Residency(model, checkpoint, budget_bytes=budget_bytes, max_bits=max_bits, swaps=swaps)
    return residency.start(model), residency


def check_change(max_bits: int, residency: Residency | None) -> None:
    """Raise InputError for an impossible width, and for an engine in which a budget decides about planes."""
    check_bits(max_bits)
    if residency is not None:
        raise InputError("resident decides which planes are in memory; open an engine without it to add or evict some")


def _read_swap(entry: Sequence[int]) -> Swap:
    try:
        return Swap(*entry)
    except TypeError:
        raise InputError(f"{entry!r} is not a swap; give (step, layer, expert, bits)") from None


def _read_budget(resident: str | int, checkpoint: Checkpoint, *, max_bits: int) -> int:
    """Return a budget such as "2GB" in bytes, before anything is loaded.

    InputError if the checkpoint has no quantised experts, or if they do not fit at int2 beside the other weights.
    """
    budget_bytes = read_size(resident, "resident") if isinstance(resident, str) else resident
    experts = {path for path in checkpoint.shapes if ".experts." in path}
    if not experts:
        raise InputError(
            f"resident needs a model with quantised experts, and {checkpoint.directory} has none; "
            "use a smaller max_bits"
        )
    needed_bytes = plain_bytes(checkpoint)
    for path, shape in checkpoint.shapes.items():
        bits = _floor(max_bits) if path in experts else max(max_bits, checkpoint.least.get(path, 1))
        needed_bytes += planes_bytes(*shape, bits=bits_read(bits, rule=checkpoint.spec.rule))
    _check_budget(checkpoint, budget_bytes, needed_bytes)
    return budget_bytes


def _check_budget(checkpoint: Checkpoint, budget_bytes: int, needed_bytes: int) -> None:
    if budget_bytes < needed_bytes:
        raise InputError(
            f"resident={budget_bytes} bytes is below the int{FLOOR_BITS} floor: {checkpoint.directory} needs at least "
            f"{needed_bytes} bytes with its experts at int{FLOOR_BITS}; give more, or a smaller max_bits"
        )


def _floor(max_bits: int) -> int:
    """Return the width that every expert keeps."""
    return min(FLOOR_BITS, max_bits)


def levels_up_to(max_bits: int, *, rule: str) -> tuple[int, ...]:
    """Return the widest width of each number of planes, from those that every expert keeps on."""
    widest = {bits_read(bits, rule=rule): bits for bits in range(1, max_bits + 1)}
    return tuple(bits for read, bits in widest.items() if read >= bits_read(_floor(max_bits), rule=rule))
