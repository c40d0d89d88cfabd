"""llmkernels as torch's own scaled_dot_product_attention, through torch's public hook for flash attention.

torch.nn.attention knows implementations of flash attention by name; "llmkernels" is registered with it, and
`enable_sdpa()` or torch's `activate_flash_attention_impl("llmkernels")` puts our kernels under the aten ops that
scaled_dot_product_attention calls where it chooses flash attention. What torch does around them stays: the choice of
its backend (`sdpa_kernel(MATH)` goes past us), its autograd formula, torch.func, autocast and torch.compile.

    CPU   _scaled_dot_product_flash_attention_for_cpu and its backward
    CUDA  _scaled_dot_product_flash_attention and its backward; packed and nested tensors stay with torch

A call that no kernel of ours takes (fp64, for one) runs what was there before, never our plain PyTorch.
"""

import functools
import math
import warnings

import torch
from torch import Tensor

from llmkernels import _native, _op, _random, registry

NAME = "llmkernels"
OP = "scaled_dot_product_attention"
CPU_OP = "_scaled_dot_product_flash_attention_for_cpu"
CUDA_OP = "_scaled_dot_product_flash_attention"

# aten's backward has the log-sum-exp alone. Above this it has lost so many digits that the statistics of the rows are
# computed once more: a mask of finfo.min leaves nothing of the logarithm.
LARGE_LSE = 1024.0


def enable_sdpa(*, backend: str | None = None) -> None:
    """Run torch.nn.functional.scaled_dot_product_attention by llmkernels wherever torch chooses flash attention.

    The same as torch.nn.attention.activate_flash_attention_impl("llmkernels"), which knows one implementation at a
    time: another one that was active is restored first. Undone by `disable_sdpa()` or torch's
    restore_flash_attention_impl(). Dropout and a mask with a gradient are not flash attention's on the CPU, where torch
    computes these by its formula, as it does ranks other than four.

    Args:
        backend: force a backend, "torch" (our reference) too. Default: the best kernel of each device; on a device
            without one torch's own stays.
    Raises: RuntimeError, this torch has no such hook, or no kernel is here for any device (the message says why);
        ValueError, unknown backend.
    """
    attention = torch.nn.attention
    if not hasattr(attention, "register_flash_attention_impl"):
        raise RuntimeError(
            f"enable_sdpa: torch {torch.__version__} has no register_flash_attention_impl, expected 2.11"
        )
    if backend is not None:
        registry.checked_name(backend, "enable_sdpa")
    attention.register_flash_attention_impl(NAME, register_fn=functools.partial(_install, backend))
    try:
        attention.activate_flash_attention_impl(NAME)
    finally:
        attention.register_flash_attention_impl(NAME, register_fn=_install)


def disable_sdpa() -> bool:
    """Undo `enable_sdpa`: torch's own kernels are back. Returns whether llmkernels was what was active."""
    attention = torch.nn.attention
    current = getattr(attention, "current_flash_attention_impl", lambda: None)()
    if current != NAME:
        return False
    attention.restore_flash_attention_impl()
    return True


class _Handle:
    """What torch keeps while the implementation is active."""

    def __init__(self, library: torch.library.Library):
        self.library = library

    def remove(self) -> None:
        self.library._destroy()


def _keys(backend: str | None) -> list[str]:
    """The dispatch keys that have a kernel. Raises RuntimeError if none has."""
    on_gpu = torch.cuda.is_available()
    if backend == "torch":
        return ["CPU", "CUDA"] if on_gpu else ["CPU"]
    if backend == "triton" and not on_gpu:
        return ["CPU"]  # its interpreter
    if backend is not None:
        return ["CUDA"] if backend in ("cuda", "triton") else ["CPU"]
    absent = {"CPU": _native.why_absent("cpu"), "CUDA": None}
    if not on_gpu:
        absent["CUDA"] = "torch sees no GPU"
    elif _native.why_absent("cuda") and _op.triton_absent():
        absent["CUDA"] = f"{_native.why_absent('cuda')}, and Triton is {_op.triton_absent()}"
    keys = [key for key, reason in absent.items() if reason is None]
    if not keys:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in absent.items())
        raise RuntimeError(f"enable_sdpa: there is no attention kernel to enable ({reasons})")
    return keys


def _install(backend: str | None = None) -> _Handle:
    implementations = {"CPU": {CPU_OP: _CPU, f"{CPU_OP}_backward": _CPUBackward},
                       "CUDA": {CUDA_OP: _CUDA, f"{CUDA_OP}_backward": _CUDABackward}}  # fmt: skip
    keys = _keys(backend)
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is overridden
        for key in keys:
            for name, implementation in implementations[key].items():
                before = torch.library.get_kernel(f"aten::{name}", key)
                library.impl(name, implementation(before, key, backend), key, allow_override=True)
    return _Handle(library)


class _Implementation:
    """An aten op by llmkernels; `before` is the kernel that it had."""

    def __init__(self, before, key: str, backend: str | None):
        self.before, self.backend = before, backend
        self.keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def original(self, *args, **kwargs):
        return self.before.call_boxed(self.keyset, *args, **kwargs)

    def entry(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> registry.Backend | None:
        """Who runs the call; None: torch's own kernel."""
        found = registry.pick(OP, (q, k, v, mask, None, None), self.backend)
        return None if found.name == "torch" and self.backend != "torch" else found


def _options(q: Tensor, is_causal: bool, scale: float | None, dropout_p: float = 0.0) -> tuple:
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return scale, -1, 0 if is_causal else -1, True, 0.0, dropout_p


def _four_dimensions(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None else mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def _forward(entry, q, k, v, mask, seed, options):
    return entry.fwd(q, k, v, mask, None, None, seed, None, None, q.shape[2], *options)


def _backward(entry, dout, q, k, v, mask, seed, out, row_max, log_sum, options) -> tuple[Tensor, Tensor, Tensor]:
    wanted = (True, True, True, False, False)
    tensors = (q, k, v, mask, None, None, seed, None, None)
    return entry.bwd(dout, None, *tensors, q.shape[2], k.shape[2], out, row_max, log_sum, *options, wanted)[:3]


def _rows_of_heads(x: Tensor) -> Tensor:
    """The same, laid out as [B, S, H, ...], as aten's fakes promise it: compiled code relies on strides."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """The same, laid out as torch.empty_like(like) is, where aten's fakes promise that."""
    strides = torch.empty_like(like, device="meta").stride()
    return x if x.stride() == strides else torch.empty_like(like).copy_(x)


class _CPU(_Implementation):
    def __call__(self, query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        entry = self.entry(query, key, value, attn_mask)
        if entry is None or dropout_p > 0.0:
            return self.original(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        options = _options(query, is_causal, scale)
        out, row_max, log_sum = _forward(entry, query, key, value, _four_dimensions(attn_mask), None, options)
        return _laid_out_as(out, query), _rows_of_heads(row_max + log_sum)


class _CPUBackward(_Implementation):
    def __call__(self, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *,
                 attn_mask=None, scale=None):  # fmt: skip
        entry = self.entry(query, key, value, attn_mask)
        if entry is None or dropout_p > 0.0:
            arguments = (grad_out, query, key, value, out, logsumexp, dropout_p, is_causal)
            return self.original(*arguments, attn_mask=attn_mask, scale=scale)
        mask, options = _four_dimensions(attn_mask), _options(query, is_causal, scale)
        statistics = logsumexp, torch.zeros_like(logsumexp)
        if mask is not None and bool(((logsumexp.abs() > LARGE_LSE) & torch.isfinite(logsumexp)).any()):
            statistics = _forward(entry, query, key, value, mask, None, options)[1:]
        grads = _backward(entry, grad_out, query, key, value, mask, None, out, *statistics, options)
        return tuple(map(_rows_of_heads, grads))


class _CUDA(_Implementation):
    def __call__(self, query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        entry = self.entry(query, key, value, None)
        if entry is None or return_debug_mask:
            return self.original(query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale)
        device, options = query.device, _options(query, is_causal, scale, dropout_p)
        seed = _random.draw_seed(device) if dropout_p > 0.0 else None
        out, row_max, log_sum = _forward(entry, query, key, value, None, seed, options)
        # Where aten has the state of its generator, our seed is kept, twice.
        state = torch.zeros(2, dtype=torch.int64, device=device) if seed is None else seed.repeat(2)
        unused = torch.zeros((), dtype=torch.uint64, device=device)
        none = query.new_empty(0)
        lengths = query.shape[2], key.shape[2]
        return _laid_out_as(out, query), row_max + log_sum, None, None, *lengths, state.view(torch.uint64), unused, none


class _CUDABackward(_Implementation):
    def __call__(self, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
                 is_causal, philox_seed, philox_offset, *, scale=None):  # fmt: skip
        entry = self.entry(query, key, value, None)
        if entry is None:
            return self.original(
                grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
                philox_seed, philox_offset, scale=scale,
            )  # fmt: skip
        seed = philox_seed.view(torch.int64)[0] if dropout_p > 0.0 else None
        statistics = logsumexp, torch.zeros_like(logsumexp)
        options = _options(query, is_causal, scale, dropout_p)
        grads = _backward(entry, grad_out, query, key, value, None, seed, out, *statistics, options)
        return tuple(map(_laid_out_as, grads, (query, key, value)))


if hasattr(torch.nn.attention, "register_flash_attention_impl"):
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_install)
