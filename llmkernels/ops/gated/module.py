"""The MLP around a gated unit."""

import torch
from torch import Tensor

from llmkernels.ops.gated.op import OP_OF, gated


class SwiGLU(torch.nn.Module):
    """The MLP of LLaMA: `down_proj(act(gate_proj(x)) * up_proj(x))`, with LLaMA's state_dict.

    `activation` is "silu" | "gelu" | "gelu_tanh" | "relu"; `backend` forces a backend of the gated unit.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        device=None,
        dtype=None,
        *,
        activation: str = "silu",
        backend: str | None = None,
    ):
        super().__init__()
        if activation not in OP_OF:
            raise ValueError(f"SwiGLU: activation is {activation!r}, expected one of {', '.join(OP_OF)}")
        self.activation = activation
        self.backend = backend
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = torch.nn.Linear(hidden_size, intermediate_size, **factory)
        self.up_proj = torch.nn.Linear(hidden_size, intermediate_size, **factory)
        self.down_proj = torch.nn.Linear(intermediate_size, hidden_size, **factory)

    def forward(self, input: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(input), self.up_proj(input), self.activation, self.backend))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
