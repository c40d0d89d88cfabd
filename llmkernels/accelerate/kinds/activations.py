"""GELU (exact and tanh, however it is written) and SiLU as modules: what they compute is found by trying them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmkernels import functional
from llmkernels.accelerate.candidate import Candidate, Found, device_of, parameter_dtype
from llmkernels.ops.gated.reference import ACTIVATIONS

_WORDS = ("gelu", "silu", "swish")
_WIDTH = 1024  # of rows to time with: that of the inner layer of a small model


def recognise(module: nn.Module) -> Found:
    named = any(word in type(module).__name__.lower() for word in _WORDS)
    if not named or list(module.children()) or list(module.parameters()) or list(module.buffers()):
        return None
    if getattr(module, "inplace", False):
        return [], "it writes over its input"
    name = activation_of(module.forward)
    if name not in ("gelu", "gelu_tanh", "silu"):
        return [], "it computes neither GELU, exact or by tanh, nor SiLU"
    op = "silu" if name == "silu" else "gelu"
    return [Candidate(op, name.replace("_", " by "), (_WIDTH,), _Activation(name), example=_example)], ""


def activation_of(function: Callable) -> str | None:
    """Which activation of gated units `function` computes: "silu", "gelu", "gelu_tanh", "relu"; None: another."""
    x = torch.linspace(-6.0, 6.0, 49, dtype=torch.float64)
    try:
        with torch.no_grad():
            y = function(x.clone())
    except Exception:  # whatever a user's function cannot do with one tensor: it is no activation then
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    # Exact GELU and its tanh are 5e-4 apart; fp64 allows for a constant that was written in fp32.
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(y.double(), known(x), 0.0, 1e-6)), None)


def hooked(module: nn.Module) -> bool:
    """Whether somebody's hooks watch the module, which are to be called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _example(module: nn.Module) -> tuple[Tensor | None, ...]:
    return torch.empty(1, _WIDTH, dtype=parameter_dtype(module), device=device_of(module)), None


@dataclass(frozen=True)
class _Activation:
    name: str

    def __call__(self, module, input: Tensor, backend: str | None) -> Tensor:
        if self.name == "silu":
            return functional.silu(input, backend=backend)
        return functional.gelu(input, approximate="tanh" if self.name == "gelu_tanh" else "none", backend=backend)
