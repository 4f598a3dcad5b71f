"""matquant: one int8 checkpoint that is a good int4 and int2 model too (Matryoshka Quantization).

The base package needs no torch. ``load``, ``MatQuantConfig``, ``quantize`` and ``evaluate`` come with the extra
``train``. Every name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matquant.core.nest import slice_codes, slice_values
    from matquant.core.spec import Plan, Spec
    from matquant.core.tensor import NestedTensor
    from matquant.engine.engine import Engine
    from matquant.format.read import open_checkpoint
    from matquant.format.seal import seal_checkpoint
    from matquant.format.verify import verify_checkpoint
    from matquant.hf_torch.nested_model import load
    from matquant.integrations.quantizer import MatQuantConfig
    from matquant.measure.likelihood import evaluate
    from matquant.methods.quantize import quantize
    from matquant.system.errors import InputError

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
    "Engine": "matquant.engine.engine",
    "InputError": "matquant.system.errors",
    "MatQuantConfig": "matquant.integrations.quantizer",
    "NestedTensor": "matquant.core.tensor",
    "Plan": "matquant.core.spec",
    "Spec": "matquant.core.spec",
    "evaluate": "matquant.measure.likelihood",
    "load": "matquant.hf_torch.nested_model",
    "open_checkpoint": "matquant.format.read",
    "quantize": "matquant.methods.quantize",
    "seal_checkpoint": "matquant.format.seal",
    "slice_codes": "matquant.core.nest",
    "slice_values": "matquant.core.nest",
    "verify_checkpoint": "matquant.format.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'matquant' has no attribute {name!r}")
    try:
        module = importlib.import_module(_ON_DEMAND[name])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("matquant"):
            raise
        raise importlib.import_module("matquant.system.errors").InputError(
            f"matquant.{name} needs {error.name}, which is not installed; pip install 'matquant[train]'"
        ) from None
    globals()[name] = found = getattr(module, name)  # later accesses skip this function
    return found
