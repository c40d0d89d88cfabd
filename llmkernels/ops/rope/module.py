"""The rotary embedding as a module that owns its tables."""

import torch
from torch import Tensor

from llmkernels.ops.rope.cache import rope_cache
from llmkernels.ops.rope.op import rope


class RotaryEmbedding(torch.nn.Module):
    """`rope` with the tables of `rope_cache`: `forward(q, k, positions=None)` returns (q, k), turned.

    Args:
        dim: how many elements of a head are turned, an even number.
        length: how many positions there are tables for; `resize` makes them anew for another number.
        theta, scaling: as `rope_cache`; interleaved, seq_dim, backend: as `rope`.
        dtype: of the tables, also after `module.to(torch.bfloat16)`: 16 bits have not the digits for long sequences.
    The state_dict is empty: the tables follow from the arguments.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        length: int,
        theta: float = 10000.0,
        device=None,
        dtype: torch.dtype = torch.float32,
        *,
        scaling: dict | None = None,
        interleaved: bool = False,
        seq_dim: int = -2,
        backend: str | None = None,
    ):
        super().__init__()
        self.dim, self.theta, self.scaling, self.dtype = dim, theta, scaling, dtype
        self.interleaved, self.seq_dim, self.backend = interleaved, seq_dim, backend
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(0, dim // 2, dtype=dtype, device=device), persistent=False)
        self.resize(length)

    def resize(self, length: int) -> None:
        """Tables for `length` positions; with dynamic scaling other frequencies too."""
        self.cos, self.sin = rope_cache(
            self.theta, self.dim, length, scaling=self.scaling, dtype=self.dtype, device=self.cos.device
        )

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.cos.dtype != self.dtype:
            self.resize(self.cos.shape[0])
        return self

    def forward(self, q: Tensor, k: Tensor | None, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        settings = {"interleaved": self.interleaved, "seq_dim": self.seq_dim, "backend": self.backend}
        return rope(q, k, self.cos, self.sin, positions, **settings)

    def extra_repr(self) -> str:
        scaling = f", scaling={self.scaling}" if self.scaling else ""
        interleaved = ", interleaved=True" if self.interleaved else ""
        return f"{self.dim}, length={self.cos.shape[0]}, theta={self.theta}{scaling}{interleaved}"
