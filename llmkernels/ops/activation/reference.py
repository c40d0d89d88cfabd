"""gelu and silu with a bias in plain PyTorch: the `torch` backend, and the maths written out.

Shapes: `input`, `y`, `dy` are `[*, C]`, `bias` `[C]`. Hendrycks, Gimpel 2016, arXiv:1606.08415 (gelu, silu).
"""

import math

from torch import Tensor

from llmkernels._dtypes import accumulate_dtype
from llmkernels.ops.gated.reference import ACTIVATIONS, activated


def activation_fwd(input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The differentiable formula: act(input + bias), rounded once."""
    acc = accumulate_dtype(input.dtype)
    wide = input.to(acc) if bias is None else input.to(acc) + bias.to(acc)
    return ACTIVATIONS[activation](wide).to(input.dtype)


def activation_bwd(dy, input, bias, activation, wanted):
    """Returns (dinput, dbias), dbias in the type of sums; what is not wanted is an empty tensor."""
    acc = accumulate_dtype(input.dtype)
    wide = input.to(acc) if bias is None else input.to(acc) + bias
    gradient = dy.to(acc) * activated(wide, activation)[1]
    dinput = gradient.to(input.dtype) if wanted[0] else input.new_empty(0)
    if not wanted[1]:
        return dinput, input.new_empty(0, dtype=acc)
    return dinput, gradient.reshape(math.prod(input.shape[:-1]), input.shape[-1]).sum(0)
