"""The test kernels in tests/ptxsim/kernels: their shapes, launches, and whether what they compute is right.

A kernel here is a function `run(shape, bug=0, **settings)`: it launches with -DBUG=`bug` and returns its outputs beside
what they should be in float64; what the interpreter finds is raised as sim.Fault.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.ptxsim import sim

KERNELS = Path(__file__).with_name("kernels")


def marked_lines(source: str, mark: str) -> set[int]:
    """Numbers of the lines of a kernel's file that carry "[mark]" in a comment at their end."""
    lines = (KERNELS / source).read_text().splitlines()
    return {number for number, line in enumerate(lines, 1) if f"[{mark}]" in line.rpartition("//")[2]}


def named_lines(message: str, source: str) -> set[int]:
    """Numbers of the lines of a file that a message names."""
    return {int(number) for number in re.findall(rf"{re.escape(source)}:(\d+)", message)}


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with nothing near it: what a kernel touches beyond its ends is never, by chance, another tensor."""
    space = 1 << 16
    memory = bytearray(tensor.nbytes + 2 * space)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=space).view(tensor.shape)
    return copy.copy_(tensor)


def random(*shape: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return guarded(torch.randn(shape, generator=generator).to(dtype))


def unwritten(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return guarded(torch.full(shape, math.nan if dtype.is_floating_point else -1, dtype=dtype))


# Name -> (got, expected, relative tolerance, absolute tolerance).
Outputs = dict[str, tuple[torch.Tensor, torch.Tensor, float, float]]


def first_wrong(outputs: Outputs) -> str | None:
    """A sentence about the first output that is wrong."""
    for name, (got, expected, relative, absolute) in outputs.items():
        try:
            torch.testing.assert_close(got.double(), expected.double(), rtol=relative, atol=absolute)
        except AssertionError as error:
            return f"{name}: {error}"
    return None


def launch(source: str, bug: int, *args, **settings) -> dict:
    return sim.launch(*args, source=KERNELS / source, defines=(f"BUG={bug}",), **settings)


# --- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    batch: int
    heads: int
    kv_heads: int
    sq: int
    sk: int
    dim: int
    causal: bool

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"d{self.dim}-{mask}-b{self.batch}-h{self.heads}/{self.kv_heads}-sq{self.sq}-sk{self.sk}"


@functools.cache
def _attention_data(shape: Attention) -> tuple[torch.Tensor, ...]:
    """q, k, v and, in float64, the output and the logarithms of the sums."""
    kv = (shape.batch, shape.kv_heads, shape.sk, shape.dim)
    q = random(shape.batch, shape.heads, shape.sq, shape.dim, seed=1, dtype=torch.bfloat16)
    k, v = (random(*kv, seed=seed, dtype=torch.bfloat16) for seed in (2, 3))
    wide_k, wide_v = (t.double().repeat_interleave(shape.heads // shape.kv_heads, 1) for t in (k, v))
    scores = q.double() @ wide_k.transpose(-1, -2) / math.sqrt(shape.dim)
    if shape.causal:
        seen = torch.ones(shape.sq, shape.sk, dtype=torch.bool).tril(shape.sk - shape.sq)
        scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    return q, k, v, scores.softmax(-1).nan_to_num(0) @ wide_v, lse


def attention(shape: Attention, bug: int = 0, **settings) -> Outputs:
    q, k, v, expected, expected_lse = _attention_data(shape)
    out, lse = unwritten(*q.shape, dtype=torch.bfloat16), unwritten(*q.shape[:-1])
    kernel = f"attention_d{shape.dim}_{'causal' if shape.causal else 'full'}"
    grid, shared = (-(-shape.sq // 64), shape.batch * shape.heads), 5 * 64 * shape.dim * 2
    scale = 1 / math.sqrt(shape.dim)
    sizes = (shape.heads, shape.kv_heads, shape.sq, shape.sk)
    launch("attention.cu", bug, kernel, grid, 128, shared, q, k, v, out, lse, *sizes, scale, **settings)
    return {"out": (out, expected, 1e-2, 1e-2), "lse": (lse, expected_lse, 1e-5, 1e-4)}


# --- layer norm ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerNorm:
    rows: int
    cols: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"


@functools.cache
def _layernorm_data(shape: LayerNorm) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, dy and, in float64, y, dx, dweight, dbias."""
    x, dy = (random(shape.rows, shape.cols, seed=seed) for seed in (1, 2))
    weight, bias = (random(shape.cols, seed=seed) for seed in (3, 4))
    wide = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = torch.nn.functional.layer_norm(wide[0], (shape.cols,), wide[1], wide[2])
    return x, weight, bias, dy, y.detach(), *torch.autograd.grad(y, wide, dy.double())


def layernorm(shape: LayerNorm, bug: int = 0, **settings) -> Outputs:
    x, weight, bias, dy, *expected = _layernorm_data(shape)
    y, dx, mean, rstd = unwritten(*x.shape), unwritten(*x.shape), unwritten(shape.rows), unwritten(shape.rows)
    dweight, dbias = guarded(torch.zeros(shape.cols)), guarded(torch.zeros(shape.cols))
    vectors = shape.cols // 4
    forward = (x, weight, bias, y, mean, rstd, vectors, 1e-5)
    backward = (dy, x, weight, mean, rstd, dx, dweight, dbias, vectors)
    launch("layernorm.cu", bug, "layer_norm_fwd", shape.rows, 256, 0, *forward, **settings)
    launch("layernorm.cu", bug, "layer_norm_bwd", shape.rows, 256, 0, *backward, **settings)
    got = (y, dx, dweight, dbias)
    named = zip(("y", "dx", "dweight", "dbias"), got, expected, strict=True)
    return {name: (ours, wanted, 1e-5, 2e-5) for name, ours, wanted in named}


# --- matmul ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matmul:
    m: int
    n: int
    k: int
    stages: int = 4

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}-stages{self.stages}"


@functools.cache
def _int8_data(shape: Matmul) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-128, 128, (rows, shape.k), generator=generator) for rows in (shape.m, shape.n))
    return guarded(a.to(torch.int8)), guarded(b.to(torch.int8)), a @ b.T


def int8_gemm(shape: Matmul, bug: int = 0, **settings) -> Outputs:
    a, b, expected = _int8_data(shape)
    c = unwritten(shape.m, shape.n, dtype=torch.int32)
    grid = (-(-shape.n // 64), -(-shape.m // 64))
    launch("int8_gemm.cu", bug, "int8_gemm", grid, 128, 0, a, b, c, shape.m, shape.n, shape.k, **settings)
    return {"c": (c, expected, 0, 0)}


@functools.cache
def _hopper_data(shape: Matmul) -> tuple[torch.Tensor, ...]:
    a = random(shape.m, shape.k, seed=1, dtype=torch.bfloat16)
    b = random(shape.n, shape.k, seed=2, dtype=torch.bfloat16)
    return a, b, a.double() @ b.double().T


def hopper_gemm(shape: Matmul, bug: int = 0, **settings) -> Outputs:
    a, b, expected = _hopper_data(shape)
    c = unwritten(shape.m, shape.n, dtype=torch.bfloat16)
    consumers, cols = {4: (1, 64), 2: (2, 128)}[shape.stages]
    rows = 64 * consumers
    shared = shape.stages * (rows + cols) * 128 + rows * cols * 2 + 16 * shape.stages
    grid = (-(-shape.n // cols), -(-shape.m // rows))
    maps = [
        sim.TensorMap(tensor, (box_rows, 64), sim.Swizzle.B128) for tensor, box_rows in ((a, rows), (b, cols), (c, 64))
    ]
    block, shared = 128 * (1 + consumers), -(-shared // 1024) * 1024
    kernel = f"hopper_gemm_stages{shape.stages}"
    launch("hopper_gemm.cu", bug, kernel, grid, block, shared, *maps, shape.k, arch="sm_90a", **settings)
    return {"c": (c, expected, 2**-8, 1e-3)}


# The shapes of PTXSIM.md, section 8: tails, one tile and several, rows without keys, grouped heads.
SHAPES: dict[Callable, tuple] = {
    attention: (
        Attention(1, 2, 2, 256, 256, 64, True),
        Attention(1, 2, 1, 100, 77, 64, False),
        Attention(2, 2, 1, 33, 130, 64, True),
        Attention(1, 2, 2, 130, 70, 64, True),
        Attention(1, 1, 1, 128, 128, 128, True),
        Attention(1, 1, 1, 1, 1, 64, True),
    ),
    layernorm: (LayerNorm(7, 1024), LayerNorm(3, 40), LayerNorm(64, 4096)),
    int8_gemm: (Matmul(64, 64, 64, 3), Matmul(100, 72, 208, 3), Matmul(256, 256, 512, 3)),
    hopper_gemm: (Matmul(64, 64, 64), Matmul(100, 72, 200), Matmul(128, 192, 512, 2)),
}


# --- micro-kernels ---------------------------------------------------------------------------------------------------


def micro(kernel: str, words: torch.Tensor, out: torch.Tensor, *, blocks=1, threads=32, **settings) -> torch.Tensor:
    """Launch a kernel of micro.cu or micro_sm90.cu on words of 32 bits; `out` afterwards."""
    source = "micro_sm90.cu" if settings.get("arch") == "sm_90a" else "micro.cu"
    sim.launch(kernel, blocks, threads, 0, words, out, source=KERNELS / source, **settings)
    return out
