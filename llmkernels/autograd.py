"""The torch.autograd.Functions themselves, for people who write their own modules: `X.apply(...)`."""

from llmkernels.ops.attention.op import AttentionFunction
from llmkernels.ops.gated.op import GatedFunction
from llmkernels.ops.lstm.op import LSTMCellFunction, LSTMFunction
from llmkernels.ops.norm.op import LayerNormFunction, RMSNormFunction

__all__ = [
    "AttentionFunction",
    "GatedFunction",
    "LSTMCellFunction",
    "LSTMFunction",
    "LayerNormFunction",
    "RMSNormFunction",
]
