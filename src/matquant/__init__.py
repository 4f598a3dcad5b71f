"""matquant: one int8 checkpoint that is a good int4 and int2 model too (Matryoshka Quantization).

The base package needs no torch. ``load``, ``MatQuantConfig``, ``quantize`` and ``evaluate`` come with the extra
``train``. Every name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matquant.checkpoint import open_checkpoint, verify_checkpoint
    from matquant.errors import InputError
    from matquant.eval.likelihood import evaluate
    from matquant.integrations.quantizer import MatQuantConfig
    from matquant.integrations.transformers import load
    from matquant.nest import slice_codes, slice_values
    from matquant.runtime.engine import Engine
    from matquant.seal import seal_checkpoint
    from matquant.spec import Plan, Spec
    from matquant.tensor import NestedTensor
    from matquant.train import quantize

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "InputError",
    "MatQuantConfig",
    "NestedTensor",
    "Plan",
    "Spec",
    "evaluate",
    "load",
    "open_checkpoint",
    "quantize",
    "seal_checkpoint",
    "slice_codes",
    "slice_values",
    "verify_checkpoint",
]

_ON_DEMAND = {
    "Engine": "matquant.runtime.engine",
    "InputError": "matquant.errors",
    "MatQuantConfig": "matquant.integrations.quantizer",
    "NestedTensor": "matquant.tensor",
    "Plan": "matquant.spec",
    "Spec": "matquant.spec",
    "evaluate": "matquant.eval.likelihood",
    "load": "matquant.integrations.transformers",
    "open_checkpoint": "matquant.checkpoint",
    "quantize": "matquant.train",
    "seal_checkpoint": "matquant.seal",
    "slice_codes": "matquant.nest",
    "slice_values": "matquant.nest",
    "verify_checkpoint": "matquant.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'matquant' has no attribute {name!r}")
    try:
        module = importlib.import_module(_ON_DEMAND[name])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("matquant"):
            raise
        raise importlib.import_module("matquant.errors").InputError(
            f"matquant.{name} needs {error.name}, which is not installed; pip install 'matquant[train]'"
        ) from None
    globals()[name] = found = getattr(module, name)  # so that it is not asked for again
    return found
