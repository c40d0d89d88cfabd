"""Every instantiation of the norm kernels, launched with params built by hand."""

import re
import struct

import core
import pytest
import torch

TYPES = {"d": (torch.float64, 0), "f": (torch.float32, 1), "13__nv_bfloat16": (torch.bfloat16, 2), "6__half": (torch.float16, 3)}
NAME = re.compile(r"norm_fwd_(long_)?kernelI(d|f|13__nv_bfloat16|6__half)LNS_8NormKindE([01])ELi(\d+)E(?:Li(\d+)E)?Lb([01])E")


@pytest.fixture(scope="module")
def module(nvcc):
    return core.Module(nvcc(core.ROOT / "csrc/ops/norm/norm_fwd.cu", "sm_80", "-I", str(core.ROOT / "csrc")), "norm_fwd.ptx")


def test_all_forward_kernels(module):
    names = [name for name in module.kernels() if NAME.search(name)]
    assert len(names) == len(module.kernels()) == 64
    for number, name in enumerate(names):
        long, kind, norm, vector, vectors, block = NAME.search(name).groups()
        dtype, code = TYPES[kind]
        vector, block, norm = int(vector), block == "1", int(norm)
        threads = 128 if not block else 64
        most = vector * int(vectors) * (threads if block else 32) if vectors else 3 * vector * 40
        rows, cols = 5, max(vector, most - vector * 3) if vectors else most
        torch.manual_seed(number)
        residual = number % 3 == 0
        wide = number % 2 == 0
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        x, r = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(dtype)
        weight, bias = (torch.randn(cols).to(acc if wide else dtype) for _ in range(2))
        y, new, mean, rstd = torch.full_like(x, float("nan")), torch.full_like(x, float("nan")), torch.zeros(rows, dtype=acc), torch.zeros(rows, dtype=acc)
        weight_code = (0 if dtype == torch.float64 else 1) if wide else code
        params = struct.pack("<8Q4q2d3i4x", x.data_ptr(), r.data_ptr() if residual else 0, weight.data_ptr(), bias.data_ptr(), y.data_ptr(),
                             new.data_ptr() if residual else 0, 0 if norm else mean.data_ptr(), rstd.data_ptr(), rows, cols, cols, cols, 1e-5, 0.0,
                             code, weight_code, norm)  # fmt: skip
        with core.registered(x, r, weight, bias, y, new, mean, rstd, names=["x", "residual", "weight", "bias", "y", "new_residual", "mean", "rstd"]):
            result = module.launch(name, 2, threads, [params], seed=number)
        assert not result.fault, result.message
        s = (x.double() + r.double()).to(dtype) if residual else x
        if residual:
            assert torch.equal(new, s)
        s = s.double()
        if norm == 0:
            s = s - s.mean(-1, keepdim=True)
        want = s * torch.rsqrt((s * s).mean(-1, keepdim=True) + 1e-5) * weight.double() + bias.double()
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert torch.allclose(y.double(), want, rtol=tolerance, atol=tolerance), name
