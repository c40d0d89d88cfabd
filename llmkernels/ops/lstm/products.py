"""The product of all steps' inputs with their weights, by the fastest matrix product that there is.

torch multiplies fp32 matrices on the CPU with MKL, which on AMD's processors runs at about half the speed of oneDNN
(measured on a Zen 5, one thread, 4096 x 256 x 1024 and 128 x 1024 x 4096: 33-40 against 85-97 GFLOP/s). oneDNN is in
torch as well, behind an op without a derivative. It is wrong where OMP_THREAD_LIMIT gives it fewer threads than torch
believes to have (seen in torch 2.13): not there. For many rows the recurrence's own tiles are the faster ones, in fp32
and where AVX512-BF16 is the best that there is for bf16 (there, 4096 x 1024 x 4096: 244 GFLOP/s against 212 in fp32,
490 against 394-421 in bf16, of 260 and 520 that the core can do; with 256 instead of 1024 both write as fast as
they can).
"""

import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from llmkernels import _native, _op
from llmkernels._autograd import is_differentiated, needs_grad, transform_active

# Below, the call costs more than is won: a row alone is a matrix-vector product.
MIN_ROWS = 16
# Packing the weights is 3 % of the product of so many rows.
MIN_PACKED_ROWS = 256


def _plain_product(x: Tensor, weights: Tensor, bias: Tensor | None, columns: bool) -> Tensor:
    """x @ weights^T + bias, or x @ weights if `columns`: what the op `rows_product` is."""
    return torch_functional.linear(x, weights.t() if columns else weights, bias)


def _product_fake(x: Tensor, weights: Tensor, bias: Tensor | None, columns: bool) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[1 if columns else 0])


_op.define_kernel(
    "rows_product",
    "(Tensor x, Tensor weights, Tensor? bias, bool columns) -> Tensor",
    _product_fake,
    _plain_product,
)
_rows_product = _op.kernel("cpu", "rows_product")


@functools.cache
def _on_amd() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()


@functools.cache
def _onednn_is_faster() -> bool:
    return _on_amd() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn_works() -> bool:
    return _onednn_is_faster() and not 0 < _thread_limit() < torch.get_num_threads()


def _packed_is_faster(x: Tensor) -> bool:
    """Whether `rows_product` is the fastest for these rows."""
    if x.shape[0] < MIN_PACKED_ROWS or not _on_amd() or _native.why_absent("cpu") is not None:
        return False
    sets = ("avx512_bf16",) if x.dtype == torch.bfloat16 else ("avx512", "avx512_vnni", "avx512_bf16")
    return x.dtype in (torch.float32, torch.bfloat16) and _native.module("cpu").isa() in sets


@functools.cache
def _thread_limit() -> int:
    """OpenMP's, which it reads once; 0: none."""
    text = os.environ.get("OMP_THREAD_LIMIT", "").strip()
    return int(text) if text.isdigit() else 0


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _LinearFunction(torch.autograd.Function):
    """apply(x, weight, bias, packed): by `rows_product` if `packed`, else by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias, packed):
        ctx.save_for_backward(x, weight)
        ctx.packed = packed
        return _product(x, weight, bias, packed)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs, plain = ctx.needs_input_grad, is_differentiated()
        dx = dweight = None
        if needs[0] and plain:
            dx = dy @ weight
        elif needs[0]:
            dx = _rows_product(dy, weight, None, True) if ctx.packed else _onednn(dy, weight.t())
        if needs[1]:
            dweight = dy.t() @ x if plain else _weight_gradient(dy, x)
        return dx, dweight, dy.sum(0) if needs[2] else None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, packed: bool) -> Tensor:
    return _rows_product(x, weight, bias, False) if packed else _onednn(x, weight, bias)


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    if dy.dtype != torch.float32 or not _onednn_works():
        return dy.t() @ x
    # csrc/torch/product.h says why, and does the same for w_hh.
    return _onednn(x.t(), dy.t()).t().contiguous() if x.shape[0] >= 4 * x.shape[1] else _onednn(dy.t(), x.t())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, native: bool = False) -> Tensor:
    """torch.nn.functional.linear of rows `x` `[N, I]`, by our own product only if `native`."""
    if not x.is_cpu or x.shape[0] < MIN_ROWS or x.shape[1] == 0 or torch.compiler.is_compiling() or transform_active():
        return torch_functional.linear(x, weight, bias)
    packed = native and _packed_is_faster(x)
    if not packed and (x.dtype != torch.float32 or not _onednn_works()):
        return torch_functional.linear(x, weight, bias)
    if needs_grad(x, weight, bias):
        return _LinearFunction.apply(x, weight, bias, packed)
    return _product(x, weight, bias, packed)
