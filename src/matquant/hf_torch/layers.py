"""Which linears are quantised: FFN, attention or all, in any architecture.

A linear under a decoder layer is attention if its path says ``attn`` or ``attention``, else FFN. That rule covers every
decoder family transformers has, OPT's bare fc1 and fused experts included, without naming one.
"""

import re
from collections.abc import Mapping, Sequence

from matquant.hf_torch.models import Model, View, linear_views, whole_experts
from matquant.system.errors import InputError


def select_linears(model: Model, scope: str, *, exclude: Sequence[str] = ()) -> Mapping[str, View]:
    """Path -> View of the linears in ``scope`` whose path no pattern of ``exclude`` is found in.

    InputError if there are none, a pattern is not a regular expression, it would split a fused parameter, or experts
    that cannot be quantised are not excluded.
    """
    views = linear_views(model)
    chosen = {
        path: view for path, view in views.items() if scope == "all" or is_attention(path) == (scope == "attention")
    }
    for pattern in exclude:
        try:
            chosen = {path: view for path, view in chosen.items() if not re.search(pattern, path)}
        except re.error as error:
            raise InputError(f"--exclude {pattern!r} is not a regular expression ({error}); escape it") from None
    kept = [name for name in whole_experts(model) if not any(re.search(pattern, name) for pattern in exclude)]
    if kept and scope != "attention":
        raise InputError(
            f"{kept[0]} is one tensor for all experts in the checkpoint, whose codes no engine reads; --exclude experts"
        )
    split = {views[path].parameter for path in views.keys() - chosen} & {view.parameter for view in chosen.values()}
    if split:
        path = next(path for path in views if path not in chosen and views[path].parameter in split)
        raise InputError(
            f"--exclude takes {path} out of {views[path].parameter}, which transformers reads as one; "
            "exclude all of it or none"
        )
    if not chosen:
        raise InputError(
            f"{type(model).__name__} has no linear in scope {scope!r} "
            f"({len(views)} linears under its decoder layers); use another --scope"
        )
    return chosen


def is_attention(path: str) -> bool:
    """Whether a module path belongs to an attention block."""
    return re.search(r"attn|attention", path) is not None
