"""The functional surface: torch.nn.functional's signatures, plus keyword-only extras (`backend=` everywhere)."""

from llmkernels.ops.activation.op import gelu, silu
from llmkernels.ops.cross_entropy.linear_op import linear_cross_entropy
from llmkernels.ops.cross_entropy.op import cross_entropy
from llmkernels.ops.gated.op import geglu, reglu, swiglu
from llmkernels.ops.norm.op import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "cross_entropy",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "reglu",
    "rms_norm",
    "silu",
    "swiglu",
]
