"""What reaches the experts of a layer while it runs, and which of them saw too few tokens to calibrate with.

An expert sees only the tokens that the router sends to it. With fewer of them than in features its Hessian X^T X does
not have full rank, and compensation would fit those few tokens at the cost of all others. Such weights use the Hessian
of all tokens of the layer instead: of what the router reads, and for the last projection of what the expert makes of
it. (llm-compressor sends all tokens through all experts, which hides how experts differ; GPTQModel 5.7 falls back to
naive quantisation, which uses no statistics.)
Shapes: T tokens, H hidden features, I intermediate features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from matquant.core.experts import GATE_UP
from matquant.hf_torch.experts import expert_count, is_transposed
from matquant.hf_torch.views import View

NAMED = 8  # experts that a notice names


@dataclass(frozen=True)
class Paths:
    """The quantised weights of one expert: those that read the router's tokens, and those that read their product."""

    first: list[str] = field(default_factory=list)
    last: list[str] = field(default_factory=list)


def paths_by_expert(
    module: torch.nn.Module, name: str, views: Mapping[str, View], *, only: Mapping[str, Any] | None = None
) -> dict[int, Paths]:
    """Return expert -> its paths among ``views`` of a module of fused experts; only: without other paths."""
    found: dict[int, Paths] = {}
    for path, view in views.items():
        block, _, leaf = view.parameter.rpartition(".")
        if block == name and (only is None or path in only):
            expert = view.offset // module.get_parameter(leaf)[0].numel()
            paths = found.setdefault(expert, Paths())
            (paths.last if leaf == "down_proj" else paths.first).append(path)
    return found


def routed(
    module: torch.nn.Module, args: tuple[torch.Tensor, ...], expert: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows [T, H] of a module's inputs that reach an expert, or with None any expert, and their tokens [T].

    Inputs are the tokens and the experts chosen for each; or, for Llama 4, all tokens once for every expert, times the
    router's score, which is 0 where the expert is not chosen.
    """
    if len(args) == 1:
        rows_ETH = args[0].view(expert_count(module), -1, args[0].shape[-1])
        chosen_ET = rows_ETH.any(-1)
        if expert is not None:
            return rows_ETH[expert][chosen_ET[expert]], chosen_ET[expert].nonzero()[:, 0]
        return rows_ETH[chosen_ET], chosen_ET.nonzero()[:, 1]
    if expert is None:
        return args[0], torch.arange(len(args[0]), device=args[0].device)
    tokens = (args[1] == expert).any(-1).nonzero()[:, 0]
    return args[0][tokens], tokens


def product(module: Any, rows_TH: torch.Tensor, expert: int) -> torch.Tensor:
    """Return the inputs [T, I] of an expert's last projection for inputs [T, H] of its first."""
    gated = hasattr(module, GATE_UP)
    name = GATE_UP if gated else "up_proj"
    weight = getattr(module, name)[expert]
    inner = rows_TH @ (weight if is_transposed(module) else weight.T)
    bias = getattr(module, f"{name}_bias", None)
    if bias is not None:
        inner = inner + bias[expert]
    if not gated:
        found = module.act_fn(inner)
    elif hasattr(module, "_apply_gate"):
        found = module._apply_gate(inner)
    else:
        gate, up = inner.chunk(2, dim=-1)
        found = module.act_fn(gate) * up
    return found  # type: ignore[no-any-return]


def few_notice(name: str, few: Mapping[str, int], experts: int) -> str:
    """Return a line that names the experts of a layer that saw too few tokens. few: expert's name -> tokens."""
    shown = [f"{expert.rpartition('.')[2]} ({tokens})" for expert, tokens in few.items()]
    rest = f" and {len(shown) - NAMED} more" if len(shown) > NAMED else ""
    return (
        f"{name}: {len(few)} of {experts} experts saw fewer tokens than they have input features: "
        f"{', '.join(shown[:NAMED])}{rest}; they use the statistics of all tokens of the layer"
    )
