"""Modules with the constructors and state_dicts of torch.nn's, or of the models that have them."""

from llmkernels.ops.gated.module import SwiGLU
from llmkernels.ops.lstm.module import LSTM, LSTMCell
from llmkernels.ops.norm.module import LayerNorm, RMSNorm

__all__ = ["LSTM", "LSTMCell", "LayerNorm", "RMSNorm", "SwiGLU"]
