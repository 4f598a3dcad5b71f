"""Read from config.json which layers have experts, and name their matrices.

A router chooses a few experts for each token (native/decoder/experts.hpp has the formula). The row of a family
(families.py) says how its checkpoints name them; sizes and the layers that have experts come from config.json.

Sources: transformers 5.23, configuration and modeling files of mixtral, qwen2_moe, qwen3_moe and gpt_oss.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from matquant.format.facts import CHOSEN, EXPERTS
from matquant.hf.families import Routing
from matquant.system.errors import InputError

DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # of a layer without experts

Sized = tuple[str, tuple[int, int]]  # name under the decoder layer, [N, K]


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a model's layers."""

    routing: Routing  # names of the family
    count: int  # experts of a layer
    active: int  # experts of a token
    intermediate: int  # size inside an expert
    renormalise: bool  # whether the weights of a token's experts add up to 1
    shared: int  # size inside the expert that every token uses; 0: there is none
    period: int  # of the layers, every n-th has experts
    without: frozenset[int]  # layers that have none all the same

    def at(self, layer: int) -> bool:
        """Return whether a layer has experts."""
        return layer not in self.without and (layer + 1) % self.period == 0


def read_experts(routing: Routing | None, values: Mapping[str, Any], *, where: object) -> Experts | None:
    """Return the experts of a config.json, None for a family without; InputError for impossible numbers."""
    if routing is None:
        return None
    count_key = next((key for key in EXPERTS if values.get(key) is not None), EXPERTS[0])
    keys = [count_key, CHOSEN, routing.size_key, *filter(None, [routing.shared_key])]
    for key in keys:
        if type(values.get(key)) is not int or values[key] < 1:
            raise InputError(f"{where} has {key}={values.get(key)!r} in config.json; it must be an integer above 0")
    count, active = values[count_key], values[CHOSEN]
    if active > count:  # by a default: facts.check_counts looks at the file alone
        raise InputError(f"{where} has {CHOSEN}={active}, but a layer has {count} experts; repair config.json")
    return Experts(
        routing=routing,
        count=count,
        active=active,
        intermediate=values[routing.size_key],
        renormalise=bool(values.get(routing.renormalise_key)) if routing.renormalise_key else True,
        shared=values[routing.shared_key] if routing.shared_key else 0,
        period=values.get("decoder_sparse_step") or 1,
        without=frozenset(values.get("mlp_only_layers") or ()),
    )


def router_path(experts: Experts, layer: int) -> str:
    """Return the module path of a layer's router."""
    return f"model.layers.{layer}.{experts.routing.block}.{experts.routing.router}"


def expert_matrices(experts: Experts, hidden: int) -> Iterator[Sized]:
    """Yield the matrices of a layer with experts, in the order of native/python/bind_model.cpp."""
    block = experts.routing.block
    yield f"{block}.{experts.routing.router}", (experts.count, hidden)
    for expert in range(experts.count):
        names = [f"{block}.experts.{expert}.{name}" for name in experts.routing.gated]
        yield from gated_matrices(names, hidden, experts.intermediate)
    if experts.shared:
        names = [f"{block}.shared_expert.{name}" for name in experts.routing.gated]
        yield from gated_matrices(names, hidden, experts.shared)
        yield f"{block}.shared_expert_gate", (1, hidden)


def split_biases(experts: Experts, layer: int, tensors: dict[str, np.ndarray]) -> None:
    """Replace the biases of all experts of a layer, [E, 2I] and [E, H], by views of those of each one."""
    block = f"model.layers.{layer}.{experts.routing.block}.experts"
    names = [f"{block}.{name}_proj_bias" for name in ("gate_up", "down")]
    if not experts.routing.joined_biases or any(name not in tensors or tensors[name].ndim != 2 for name in names):
        return
    both, down = (tensors.pop(name) for name in names)
    parts = dict(zip(experts.routing.gated, (both[:, ::2], both[:, 1::2], down), strict=True))
    for name, part in parts.items():
        tensors |= {f"{block}.{expert}.{name}.bias": bias for expert, bias in enumerate(part)}


def gated_matrices(names: Iterable[str], hidden: int, intermediate: int) -> Iterator[Sized]:
    """Yield gate, up and down of a feed-forward block."""
    inside = (intermediate, hidden)
    return zip(names, (inside, inside, inside[::-1]), strict=True)
