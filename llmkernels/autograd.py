"""The torch.autograd.Functions themselves, for people who write their own modules: `X.apply(...)`."""

from llmkernels.ops.activation.op import ActivationFunction
from llmkernels.ops.cross_entropy.linear_op import LinearCrossEntropyFunction
from llmkernels.ops.cross_entropy.op import CrossEntropyFunction
from llmkernels.ops.gated.op import GatedFunction
from llmkernels.ops.norm.op import LayerNormFunction, RMSNormFunction

__all__ = [
    "ActivationFunction",
    "CrossEntropyFunction",
    "GatedFunction",
    "LayerNormFunction",
    "LinearCrossEntropyFunction",
    "RMSNormFunction",
]
