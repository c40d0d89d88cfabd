"""What Triton makes of its own kernels: layouts that nobody here chose, for both generations of GPUs."""

import os
import subprocess
import sys

import core
import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="ptxsim: no triton to make PTX with")

# Compiled by a process of its own: the tests set TRITON_INTERPRET, which Triton reads when a kernel is decorated.
COMPILE = """
import json, sys
import triton, triton.language as tl
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget

@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        x = tl.load(a + rm[:, None] * K + rk[None, :], mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0)
        y = tl.load(b + rk[:, None] * N + rn[None, :], mask=(rn[None, :] < N) & (rk[:, None] < K), other=0.0)
        acc = tl.dot(x, y, acc)
    tl.store(c + rm[:, None] * N + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N))

@triton.jit
def descriptors(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    x = tl.make_tensor_descriptor(a, shape=[M, K], strides=[K, 1], block_shape=[BM, BK])
    y = tl.make_tensor_descriptor(b, shape=[K, N], strides=[N, 1], block_shape=[BK, BN])
    z = tl.make_tensor_descriptor(c, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(x.load([m, k]), y.load([k, n]), acc)
    z.store([m, n], acc)

@triton.jit
def softmax(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=-float("inf"))
    v = tl.exp(v - tl.max(v, 0))
    tl.store(y + tl.program_id(0) * n + i, v / tl.sum(v, 0), mask=i < n)

name, capability, dtype, block = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
if name == "softmax":
    signature, constants = {"x": "*fp32", "y": "*fp32", "n": "i32", "B": "constexpr"}, {"B": 1024}
else:
    signature = {"a": "*" + dtype, "b": "*" + dtype, "c": "*fp32", "M": "i32", "N": "i32", "K": "i32", "BM": "constexpr", "BN": "constexpr", "BK": "constexpr"}
    constants = {"BM": 64, "BN": 64, "BK": block}
attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
kernel = triton.compile(ASTSource(globals()[name], signature=signature, constexprs=constants, attrs=attributes), target=GPUTarget("cuda", capability, 32))
print(json.dumps([kernel.asm["ptx"], kernel.metadata.shared]))
"""


def compiled(name, capability, dtype="bf16", block=32):
    import json

    script = core.CACHE / "triton_kernels.py"
    core.CACHE.mkdir(parents=True, exist_ok=True)
    script.write_text(COMPILE)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and k != "LD_PRELOAD"}
    done = subprocess.run(
        [sys.executable, str(script), name, str(capability), dtype, str(block)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ptx, shared = json.loads(done.stdout.strip().split("\n")[-1])
    return core.Module(ptx, f"{name}.ptx"), shared


@pytest.mark.parametrize("capability", [80, 90])
def test_softmax(capability):
    module, shared = compiled("softmax", capability)
    x = torch.randn(5, 784)
    y = torch.zeros_like(x)
    for seed in range(2):
        module.launch(
            "softmax",
            5,
            128,
            [x, y, 784, 0, 0],
            shared=shared,
            arch=f"sm_{capability}a" if capability == 90 else "sm_80",
            seed=seed,
        )
        assert torch.allclose(y, x.softmax(-1), atol=1e-6)


@pytest.mark.parametrize(
    "case", [(80, "matmul", "bf16"), (80, "matmul", "fp16"), (90, "matmul", "bf16"), (90, "descriptors", "bf16")]
)
def test_matmul(case):
    capability, name, kind = case
    module, shared = compiled(name, capability, kind, 64 if name == "descriptors" else 32)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    m, n, k = 96, 112, 160
    a, b, c = torch.randint(-3, 4, (m, k)).to(dtype), torch.randint(-3, 4, (k, n)).to(dtype), torch.zeros(m, n)
    store = np.zeros(1 << 14, np.uint8)
    scratch = store[-store.ctypes.data % 256 :]
    for seed in range(3):
        c.fill_(float("nan"))
        module.launch(name, (2, 2), 128, [a, b, c, m, n, k, scratch, 0], shared=shared, arch="sm_90a" if capability == 90 else "sm_80", seed=seed,
                      asynchronous=seed)  # fmt: skip
        assert torch.equal(c.double(), a.double() @ b.double())
