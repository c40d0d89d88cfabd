"""LayerNorm and RMSNorm as modules: torch's constructors, parameters and state_dicts."""

import torch
from torch import Tensor

from llmkernels.ops.norm import op


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm run by llmkernels: same constructor, same state_dict.

    `forward(input, residual)` returns (normed, new_residual) as `add_layer_norm` does. `backend` forces a backend.
    """

    def __init__(
        self,
        normalized_shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        backend: str | None = None,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.backend = backend

    def forward(self, input: Tensor, residual: Tensor | None = None):
        args = (self.normalized_shape, self.weight, self.bias, self.eps)
        if residual is None:
            return op.layer_norm(input, *args, backend=self.backend)
        return op.add_layer_norm(input, residual, *args, backend=self.backend)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm run by llmkernels: same constructor, same state_dict.

    `weight_offset=1.0` is Gemma's form, whose weight starts at zero. `forward(input, residual)` returns (normed,
    new_residual) as `add_rms_norm` does. `backend` forces a backend.
    """

    def __init__(
        self,
        normalized_shape,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device=None,
        dtype=None,
        *,
        weight_offset: float = 0.0,
        backend: str | None = None,
    ):
        if weight_offset != 0.0 and not elementwise_affine:
            raise ValueError(f"RMSNorm: weight_offset is {weight_offset} without a weight, expected 0.0")
        self.weight_offset = weight_offset
        self.backend = backend
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, input: Tensor, residual: Tensor | None = None):
        settings = {"weight_offset": self.weight_offset, "backend": self.backend}
        args = (self.normalized_shape, self.weight, self.eps)
        if residual is None:
            return op.rms_norm(input, *args, **settings)
        return op.add_rms_norm(input, residual, *args, **settings)

    def extra_repr(self) -> str:
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return super().extra_repr() + offset
