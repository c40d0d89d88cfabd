"""The functional surface: torch.nn.functional's signatures, plus keyword-only extras (`backend=` everywhere)."""

from llmkernels.ops.gated.op import geglu, reglu, swiglu
from llmkernels.ops.norm.op import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from llmkernels.ops.rope.cache import rope_cache
from llmkernels.ops.rope.op import rope, rope_
from llmkernels.ops.softmax.op import log_softmax, softmax
from llmkernels.ops.softmax.sample import sample

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "geglu",
    "layer_norm",
    "log_softmax",
    "reglu",
    "rms_norm",
    "rope",
    "rope_",
    "rope_cache",
    "sample",
    "softmax",
    "swiglu",
]
