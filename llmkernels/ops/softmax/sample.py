"""sample: one token of each row of logits, for generation. It has no gradient."""

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._dtypes import FLOAT_DTYPES, dtype_error


def taken(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """(which logits may be sampled, softmax(logits / temperature)), in plain PyTorch: by sorting."""
    x = logits.float()
    p = torch.softmax((x - x.amax(-1, keepdim=True)).double() / temperature, -1)
    kept = torch.ones_like(x, dtype=torch.bool)
    values = x.sort(-1, descending=True).values
    if 0 < top_k < x.shape[-1]:
        kept = x >= values[..., top_k - 1 : top_k]
    if top_p < 1.0:
        # The largest threshold with enough of the sum: the first place in order at which it is reached.
        sums = p.where(kept, 0.0).sort(-1, descending=True).values.cumsum(-1)
        place = (sums < top_p * sums[..., -1:]).sum(-1, keepdim=True).clamp(max=x.shape[-1] - 1)
        kept = kept & (x >= values.gather(-1, place))
    if min_p > 0.0:
        kept = kept & (p >= min_p * p.amax(-1, keepdim=True))
    return kept, p


def sample_tokens(logits, u, temperature, top_k, top_p, min_p):
    """The token of each row: the first one at which the sum of what is taken exceeds `u` times all of it."""
    top = logits.amax(-1)
    wrong = ~torch.isfinite(top)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling() and bool(wrong.any()):
        row = int(wrong.flatten().nonzero()[0])
        raise ValueError(f"sample: row {row} of logits has a NaN or +inf, or nothing but -inf, expected a distribution")
    if temperature == 0.0:
        tokens = (logits == top.unsqueeze(-1)).to(torch.uint8).argmax(-1)
    else:
        kept, p = taken(logits, temperature, top_k, top_p, min_p)
        sums = p.where(kept, 0.0).cumsum(-1)
        tokens = torch.searchsorted(sums, (u * sums[..., -1]).unsqueeze(-1), right=True).squeeze(-1)
        # By rounding no sum may exceed it: then the last one that is taken.
        places = torch.arange(p.shape[-1], device=p.device)
        tokens = torch.minimum(tokens, torch.where(kept & (p > 0.0), places, 0).amax(-1))
    return torch.where(wrong, -1, tokens)


def _fake(logits, u, temperature, top_k, top_p, min_p):
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)


def _portable(logits, u, temperature, top_k, top_p, min_p):
    return registry.pick("sample", (logits, u)).fwd(logits, u, temperature, top_k, top_p, min_p)


_op.define_kernel(
    "sample_tokens",
    "(Tensor logits, Tensor u, float temperature, int top_k, float top_p, float min_p) -> Tensor",
    _fake,
    _portable,
)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token of each row of `logits`, drawn from softmax(logits / temperature) cut by top-k, top-p and min-p.

    Args:
        logits: `[*, V]`, fp32, bf16, fp16, or fp64, which is converted to fp32.
        temperature: 0 takes the largest logit, the first of several.
        top_k: only the `top_k` largest logits, and what equals the smallest of them; 0: all.
        top_p: of these, as few of the most probable as have this share of their sum, and what equals the last of them.
        min_p: only what has at least this share of the largest probability.
        generator: draws one number for each row; default: torch's.
        backend: "cuda" | "triton" | "cpu" | "torch"; default: the first that can run this call.
    Returns: `[*]`, int64. The same for a seed on every backend but for rounding, and for any number of threads.
    Raises: ValueError or TypeError, an argument is out of range, or on a CPU a row has a NaN or +inf or only -inf: a
        row for which -1 is returned on a GPU. NoBackendError, a forced backend cannot run this call.
    Reference: Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al. 2024, arXiv:2407.01082 (min-p).
    """
    if logits.dtype not in FLOAT_DTYPES:
        raise dtype_error("sample", "logits", logits.dtype)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"sample: logits has shape {tuple(logits.shape)}, expected [*, V] with a V above zero")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"sample: temperature is {temperature}, expected 0 or more")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"sample: top_k is {top_k!r}, expected an int, 0 (all) or more")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"sample: top_p is {top_p}, expected a number above 0 and up to 1")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"sample: min_p is {min_p}, expected a number from 0 to 1")
    logits = logits.detach()
    logits = logits.float() if logits.dtype == torch.float64 else logits
    u = torch.rand(logits.shape[:-1], dtype=torch.float64, device=logits.device, generator=generator)
    chosen = registry.pick("sample", (logits, u), backend)
    return chosen.fwd(logits, u, float(temperature), top_k, float(top_p), float(min_p))


_op.lazy_triton("llmkernels.ops.softmax.sample_triton", ("sample_tokens",))


registry.register("sample", *_op.backends("sample", "sample_tokens", None, sample_tokens, None))
_op.define_public(
    "sample",
    "(Tensor logits, *, float temperature=1.0, int top_k=0, float top_p=1.0, float min_p=0.0,"
    " Generator? generator=None) -> Tensor",
    sample,
)
