"""The torch.autograd.Functions themselves, for people who write their own modules: `X.apply(...)`."""

from llmkernels.ops.activation.op import ActivationFunction
from llmkernels.ops.attention.op import AttentionFunction
from llmkernels.ops.cross_entropy.linear_op import LinearCrossEntropyFunction
from llmkernels.ops.cross_entropy.op import CrossEntropyFunction
from llmkernels.ops.gated.op import GatedFunction
from llmkernels.ops.lstm.gru import GRUFunction
from llmkernels.ops.lstm.op import LSTMCellFunction, LSTMFunction
from llmkernels.ops.norm.dropout import DropoutAddLayerNormFunction, DropoutAddRMSNormFunction
from llmkernels.ops.norm.op import LayerNormFunction, RMSNormFunction
from llmkernels.ops.quantized_linear.norm_op import RMSNormQuantizedLinearFunction
from llmkernels.ops.quantized_linear.op import QuantizedLinearFunction
from llmkernels.ops.rope.op import RopeFunction, RopeInplaceFunction
from llmkernels.ops.softmax.op import SoftmaxFunction

__all__ = [
    "ActivationFunction",
    "AttentionFunction",
    "CrossEntropyFunction",
    "DropoutAddLayerNormFunction",
    "DropoutAddRMSNormFunction",
    "GRUFunction",
    "GatedFunction",
    "LSTMCellFunction",
    "LSTMFunction",
    "LayerNormFunction",
    "LinearCrossEntropyFunction",
    "QuantizedLinearFunction",
    "RMSNormFunction",
    "RMSNormQuantizedLinearFunction",
    "RopeFunction",
    "RopeInplaceFunction",
    "SoftmaxFunction",
]
