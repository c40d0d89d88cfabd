"""Modules with the constructors and state_dicts of torch.nn's, or of the models that have them."""

from llmkernels.ops.attention.module import MultiheadAttention
from llmkernels.ops.cross_entropy.module import CrossEntropyLoss, LinearCrossEntropyLoss
from llmkernels.ops.gated.module import SwiGLU
from llmkernels.ops.lstm.gru_module import GRU, GRUCell
from llmkernels.ops.lstm.module import LSTM, LSTMCell
from llmkernels.ops.lstm.quantized import QuantizedLSTM
from llmkernels.ops.norm.module import LayerNorm, RMSNorm
from llmkernels.ops.quantized_linear.embedding import QuantizedEmbedding
from llmkernels.ops.quantized_linear.module import QuantizedLinear
from llmkernels.ops.rope.module import RotaryEmbedding

__all__ = [
    "GRU",
    "LSTM",
    "CrossEntropyLoss",
    "GRUCell",
    "LSTMCell",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "QuantizedEmbedding",
    "QuantizedLSTM",
    "QuantizedLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
]
