"""swiglu, geglu and reglu in plain PyTorch: the `torch` backend, and the maths written out.

Shapes: `gate`, `up`, `y`, `dy` are `[*, C]`. Without `up`, `gate` is packed, `[*, 2 * C]`: gate, then up.
Shazeer 2020, arXiv:2002.05202 (gated units); Hendrycks, Gimpel 2016, arXiv:1606.08415 (gelu).
"""

import math

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from llmkernels._dtypes import accumulate_dtype

ACTIVATIONS = {
    "silu": torch_functional.silu,
    "gelu": torch_functional.gelu,
    "gelu_tanh": lambda gate: torch_functional.gelu(gate, approximate="tanh"),
    "relu": torch_functional.relu,
}


def factors(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """(gate, up), of which a packed `gate` is both."""
    return gate.chunk(2, -1) if up is None else (gate, up)


def gated_fwd(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """The differentiable formula: act(gate) * up, rounded once."""
    gate, up = factors(gate, up)
    acc = accumulate_dtype(gate.dtype)
    return (ACTIVATIONS[activation](gate.to(acc)) * up.to(acc)).to(gate.dtype)


def gated_bwd(dy, gate, up, activation, wanted):
    """Returns (dgate, dup); what is not wanted is an empty tensor. One gradient and an empty tensor if packed."""
    packed = up is None
    empty = gate.new_empty(0)
    gate, up = factors(gate, up)
    dtype, acc = gate.dtype, accumulate_dtype(gate.dtype)
    dy, gate, up = dy.to(acc), gate.to(acc), up.to(acc)
    value, slope = activated(gate, activation)
    # relu's gradient is chosen, not multiplied: Inf times zero is zero there.
    dgate = torch.where(gate <= 0, 0.0, dy * up) if slope is None else dy * up * slope
    dgate, dup = dgate.to(dtype), (dy * value).to(dtype)
    if packed:
        return (torch.cat((dgate, dup), -1) if wanted[0] else empty), empty.clone()
    return dgate if wanted[0] else empty, dup if wanted[1] else empty.clone()


def activated(gate: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
    """act(gate) and its slope, None for relu."""
    if activation == "silu":
        s = torch.sigmoid(gate)
        return gate * s, s * (1.0 + gate * (1.0 - s))
    if activation == "gelu":
        cdf = 0.5 * (1.0 + torch.erf(gate * math.sqrt(0.5)))
        return gate * cdf, cdf + gate * torch.exp(-0.5 * gate * gate) / math.sqrt(2.0 * math.pi)
    if activation == "gelu_tanh":
        scale, cubic = math.sqrt(2.0 / math.pi), 0.044715
        t = torch.tanh(scale * (gate + cubic * gate**3))
        slope = 0.5 * (1.0 + t) + 0.5 * gate * (1.0 - t * t) * scale * (1.0 + 3.0 * cubic * gate * gate)
        return 0.5 * gate * (1.0 + t), slope
    return torch.relu(gate), None
