"""The product of all steps' inputs with their weights, by the fastest matrix product that this torch has.

torch multiplies fp32 matrices on the CPU with MKL, which on AMD's processors runs at about half the speed of oneDNN
(measured on a Zen 5, one thread, 4096 x 256 x 1024 and 128 x 1024 x 4096: 33-40 against 85-97 GFLOP/s). oneDNN is in
torch as well, behind an op without a derivative. It is wrong where OMP_THREAD_LIMIT gives it fewer threads than torch
believes to have (seen in torch 2.13): not there.
"""

import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from llmkernels._autograd import is_differentiated, needs_grad, transform_active

# Below, the call costs more than is won: a row alone is a matrix-vector product.
MIN_ROWS = 16


@functools.cache
def _onednn_is_faster() -> bool:
    info = Path("/proc/cpuinfo")
    amd = info.exists() and "AuthenticAMD" in info.read_text()
    return amd and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _thread_limit() -> int:
    """OpenMP's, which it reads once; 0: none."""
    text = os.environ.get("OMP_THREAD_LIMIT", "").strip()
    return int(text) if text.isdigit() else 0


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        product = (lambda a, b: a @ b.t()) if is_differentiated() else _onednn
        dx = product(dy, weight.t()) if needs[0] else None
        dweight = None
        if needs[1]:
            # csrc/torch/product.h says why, and does the same for w_hh.
            many = x.shape[0] >= 4 * x.shape[1]
            dweight = product(x.t(), dy.t()).t().contiguous() if many else product(dy.t(), x.t())
        return dx, dweight, dy.sum(0) if needs[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch.nn.functional.linear of rows `x` `[N, I]`."""
    plain = not x.is_cpu or x.dtype != torch.float32 or x.shape[0] < MIN_ROWS or x.shape[1] == 0
    if (
        plain
        or torch.compiler.is_compiling()
        or transform_active()
        or not _onednn_is_faster()
        or (0 < _thread_limit() < torch.get_num_threads())
    ):
        return torch_functional.linear(x, weight, bias)
    if needs_grad(x, weight, bias):
        return _LinearFunction.apply(x, weight, bias)
    return _onednn(x, weight, bias)
