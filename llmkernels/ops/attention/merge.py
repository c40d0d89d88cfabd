"""merge_attention: the attention to two sets of keys, from the attention to each of them."""

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._dtypes import FLOAT_DTYPES, accumulate_dtype, dtype_error

OP = "merge_attention"


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """For out `[..., Dv]` and lse `[...]`. Each row's weights are exp(lse - m), where m is the larger lse."""
    acc = accumulate_dtype(out1.dtype)
    top = torch.maximum(lse1.detach(), lse2.detach())
    top = torch.where(top == -torch.inf, 0.0, top)
    weight1, weight2 = torch.exp(lse1 - top), torch.exp(lse2 - top)
    total = weight1 + weight2
    empty = total == 0.0
    total = torch.where(empty, 1.0, total)
    # What a part without keys has in its out takes no part, were it NaN.
    parts = (
        (weight / total)[..., None] * torch.where((lse == -torch.inf)[..., None], 0.0, out.to(acc))
        for out, lse, weight in ((out1, lse1, weight1), (out2, lse2, weight2))
    )
    return sum(parts).to(out1.dtype), torch.where(empty, -torch.inf, top + torch.log(total))


def _check(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, seq_dim: int) -> None:
    if seq_dim not in (-2, -3):
        raise ValueError(f"{OP}: seq_dim is {seq_dim}, expected -2 (out [..., H, S, Dv]) or -3 (out [..., S, H, Dv])")
    if out1.dtype not in FLOAT_DTYPES:
        raise dtype_error(OP, "out1", out1.dtype)
    stats = accumulate_dtype(out1.dtype)
    for name, tensor, dtype in (("lse1", lse1, stats), ("out2", out2, out1.dtype), ("lse2", lse2, stats)):
        if tensor.device != out1.device:
            raise ValueError(f"{OP}: {name} is on {tensor.device}, expected {out1.device}, the device of out1")
        if tensor.dtype != dtype:
            raise TypeError(f"{OP}: {name} has dtype {tensor.dtype}, expected {dtype}")
    if out1.dim() < -seq_dim:
        raise ValueError(f"{OP}: out1 has shape {tuple(out1.shape)}, expected at least {-seq_dim} dimensions")
    if out2.shape != out1.shape:
        raise ValueError(f"{OP}: out2 has shape {tuple(out2.shape)}, expected {tuple(out1.shape)}, the shape of out1")
    rows = out1.shape[:-1] if seq_dim == -2 else (*out1.shape[:-3], out1.shape[-2], out1.shape[-3])
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        if tuple(lse.shape) != tuple(rows):
            raise ValueError(
                f"{OP}: {name} has shape {tuple(lse.shape)}, expected {tuple(rows)} for out1 {tuple(out1.shape)} with"
                f" seq_dim={seq_dim}"
            )


def merge_attention(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, *, seq_dim: int = -2, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of two calls together, from what each of them returned with return_lse=True.

    For what was computed apart: a cache in pieces, a prefix that many sequences share, keys on several machines. Each
    key must be in one of the two; sinks, if any, were given to one of the calls. More than two are merged one after the
    other.

    Args:
        out1, out2: `[..., H, S, Dv]`, or `[..., S, H, Dv]` with seq_dim=-3; fp64, fp32, bf16 or fp16.
        lse1, lse2: `[..., H, S]` in both cases, fp32 (fp64 for fp64). A row without keys has -inf.
        seq_dim: where out has its queries: -2 as scaled_dot_product_attention returns it, -3 as attention_varlen and
            attention_kvcache do.
        backend: "torch", which is what there is.
    Returns: (out, lse), laid out as the arguments; (0, -inf) where both parts are without keys. Differentiable in all
        four, any number of times.
    Raises: ValueError or TypeError, shapes, devices or dtypes disagree; NoBackendError, a forced backend is not there.
    Reference: Milakov, Gimelshein 2018, arXiv:1805.02867 (online softmax); Dao et al. 2023 (Flash-Decoding).
    """
    _check(out1, lse1, out2, lse2, seq_dim)
    chosen = registry.pick(OP, (out1, lse1, out2, lse2), backend)
    if seq_dim == -2:
        return chosen.fwd(out1, lse1, out2, lse2)
    out, lse = chosen.fwd(out1, lse1.transpose(-1, -2), out2, lse2.transpose(-1, -2))
    return out, lse.transpose(-1, -2)


registry.register(OP, registry.Backend(OP, "torch", merge, None, lambda *_: None))
_op.define_public(
    OP,
    "(Tensor out1, Tensor lse1, Tensor out2, Tensor lse2, *, SymInt seq_dim=-2) -> (Tensor out, Tensor lse)",
    merge_attention,
)
