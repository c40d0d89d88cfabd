"""The functional surface: torch.nn.functional's signatures, plus keyword-only extras (`backend=` everywhere)."""

from llmkernels.ops.activation.op import gelu, silu
from llmkernels.ops.attention.kvcache import attention_kvcache
from llmkernels.ops.attention.merge import merge_attention
from llmkernels.ops.attention.sdpa import scaled_dot_product_attention
from llmkernels.ops.attention.varlen import attention_varlen
from llmkernels.ops.cross_entropy.linear_op import linear_cross_entropy
from llmkernels.ops.cross_entropy.op import cross_entropy
from llmkernels.ops.gated.op import geglu, reglu, swiglu
from llmkernels.ops.lstm.cell import lstm_cell
from llmkernels.ops.lstm.gru import gru, gru_cell
from llmkernels.ops.lstm.sequence import lstm
from llmkernels.ops.norm.dropout import dropout_add_layer_norm, dropout_add_rms_norm
from llmkernels.ops.norm.op import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from llmkernels.ops.quantized_linear.norm_op import rms_norm_quantized_linear
from llmkernels.ops.quantized_linear.op import quantized_linear
from llmkernels.ops.rope.cache import rope_cache
from llmkernels.ops.rope.op import rope, rope_
from llmkernels.ops.softmax.op import log_softmax, softmax
from llmkernels.ops.softmax.sample import sample

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention_kvcache",
    "attention_varlen",
    "cross_entropy",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "geglu",
    "gelu",
    "gru",
    "gru_cell",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "lstm",
    "lstm_cell",
    "merge_attention",
    "quantized_linear",
    "reglu",
    "rms_norm",
    "rms_norm_quantized_linear",
    "rope",
    "rope_",
    "rope_cache",
    "sample",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
    "swiglu",
]
