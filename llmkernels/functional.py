"""The functional surface: torch.nn.functional's signatures, plus keyword-only extras (`backend=` everywhere)."""

from llmkernels.ops.attention.sdpa import scaled_dot_product_attention
from llmkernels.ops.attention.varlen import attention_varlen
from llmkernels.ops.gated.op import geglu, reglu, swiglu
from llmkernels.ops.lstm.cell import lstm_cell
from llmkernels.ops.lstm.sequence import lstm
from llmkernels.ops.norm.op import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention_varlen",
    "geglu",
    "layer_norm",
    "lstm",
    "lstm_cell",
    "reglu",
    "rms_norm",
    "scaled_dot_product_attention",
    "swiglu",
]
