"""torch.nn.functional by llmkernels, for code that cannot be edited: `with llmkernels.accelerated():`.

A TorchFunctionMode sees every call of a function of torch. The functions in the table run by ours where a kernel takes
the call; any other call, and any other function, runs as it ever did. Both names of a norm are there: a compiler sees
through torch.nn.functional.rms_norm to torch.rms_norm.
"""

from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmkernels import functional, registry
from llmkernels._dtypes import FLOAT_DTYPES


class FunctionalMode(TorchFunctionMode):
    """The mode; `calls` counts, in eager PyTorch, what ran where: {"rms_norm on cpu": 4, "rms_norm as ever": 1}."""

    def __init__(self, backend: str | None = None):
        super().__init__()
        if backend is not None:
            registry.checked_name(backend, "accelerated")
        self.backend = backend
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = _TABLE.get(func)
        if known is None:
            return func(*args, **kwargs)
        op, prepare = known
        call = prepare(*args, **kwargs)
        entry = None if call is None else registry.willing(op, call[0], self.backend)
        # Plain PyTorch of ours is never put in the place of torch's own, unless it is asked for.
        runs = entry is not None and (entry.name != "torch" or self.backend == "torch")
        if not torch.compiler.is_compiling():
            self.calls[f"{op} on {entry.name}" if runs else f"{op} as ever"] += 1
        return call[1](self.backend) if runs else func(*args, **kwargs)


# Each function here has torch's signature. It returns what the backends are asked with and a function of a backend that
# runs the call; None: it is a call for torch.
Prepared = tuple[tuple, Callable] | None


def _plain(*tensors: Tensor | None) -> bool:
    """Whether all are dense floating tensors of one device, neither nested nor distributed."""
    known = [t for t in tensors if t is not None]
    return all(
        t.dtype in FLOAT_DTYPES
        and t.layout is torch.strided
        and not t.is_nested
        and not hasattr(t, "placements")
        and t.device == known[0].device
        for t in known
    )


def _fits(input: Tensor, *weights: Tensor | None) -> bool:
    wide = input.dtype if input.dtype.itemsize > 2 else torch.float32
    return all(w is None or w.dtype in (input.dtype, wide) for w in weights)


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True) -> Prepared:
    if not _plain(input, weight, bias) or not _fits(input, weight, bias):
        return None
    run = lambda backend: functional.layer_norm(input, normalized_shape, weight, bias, eps, backend=backend)
    return (input, None, weight, bias), run


def _rms_norm(input, normalized_shape, weight=None, eps=None) -> Prepared:
    if not _plain(input, weight) or not _fits(input, weight):
        return None
    run = lambda backend: functional.rms_norm(input, normalized_shape, weight, eps, backend=backend)
    return (input, None, weight, None), run


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Prepared:
    if not _plain(query, key, value) or not query.dtype == key.dtype == value.dtype or query.dim() < 2:
        return None
    if attn_mask is not None and (attn_mask.dtype not in (torch.bool, query.dtype) or attn_mask.is_nested):
        return None
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    run = lambda backend: functional.scaled_dot_product_attention(*arguments, backend=backend)
    return (query, key, value, attn_mask, None, None), run


def _cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
                   label_smoothing=0.0) -> Prepared:  # fmt: skip
    legacy = size_average is not None or reduce is not None
    indices = target.dtype == torch.int64
    if legacy or not _plain(input, weight) or input.dim() == 0 or (weight is not None and weight.requires_grad):
        return None
    if not indices and (not _plain(input, target) or ignore_index >= 0 or target.dtype != input.dtype):
        return None
    arguments = (input, target, weight, ignore_index, reduction, label_smoothing)
    return (input, target, weight), lambda backend: functional.cross_entropy(*arguments, backend=backend)


_TABLE: dict[Callable, tuple[str, Callable[..., Prepared]]] = {
    torch_functional.layer_norm: ("layer_norm", _layer_norm),
    torch.layer_norm: ("layer_norm", _layer_norm),
    torch_functional.rms_norm: ("rms_norm", _rms_norm),
    torch.rms_norm: ("rms_norm", _rms_norm),
    torch_functional.scaled_dot_product_attention: ("scaled_dot_product_attention", _attention),
    torch_functional.cross_entropy: ("cross_entropy", _cross_entropy),
}
