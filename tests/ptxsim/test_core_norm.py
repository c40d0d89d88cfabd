"""Every instantiation of the norm kernels, launched with params built by hand."""

import re
import struct

import core
import pytest
import torch

from llmkernels import _random

TYPES = {
    "d": (torch.float64, 0),
    "f": (torch.float32, 1),
    "13__nv_bfloat16": (torch.bfloat16, 2),
    "6__half": (torch.float16, 3),
}
NAME = re.compile(
    r"norm_fwd_(long_)?kernelI(d|f|13__nv_bfloat16|6__half)LNS_8NormKindE([01])ELi(\d+)E(?:Li(\d+)E)?Lb([01])ELb([01])E"
)
P, SEED = 0.3, 99


def compiled(nvcc, name: str) -> core.Module:
    source = core.ROOT / f"csrc/ops/norm/{name}.cu"
    return core.Module(nvcc(source, "sm_80", "-I", str(core.ROOT / "csrc")), f"{name}.ptx")


def dropped(x: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])
    keep = _random.keep(torch.tensor(SEED), rows, columns, P)
    return torch.where(keep, x * _random.keep_scale(P), 0.0)


def dropout_fields(dropout: bool, seed: torch.Tensor) -> tuple:
    """dropout_threshold, dropout_scale and seed of the params."""
    return (_random.threshold(P), _random.keep_scale(P), seed.data_ptr()) if dropout else (0, 0.0, 0)


@pytest.mark.parametrize("dropout", (False, True))
def test_all_forward_kernels(nvcc, dropout):
    module = compiled(nvcc, "norm_fwd_dropout" if dropout else "norm_fwd")
    seed = torch.tensor(SEED)
    names = [name for name in module.kernels() if NAME.search(name)]
    assert len(names) == len(module.kernels()) == 64
    for number, name in enumerate(names):
        _, kind, norm, vector, vectors, block, flag = NAME.search(name).groups()
        assert flag == str(int(dropout))
        dtype, code = TYPES[kind]
        vector, block, norm = int(vector), block == "1", int(norm)
        threads = 128 if not block else 64
        most = vector * int(vectors) * (threads if block else 32) if vectors else 3 * vector * 40
        rows, cols = 5, max(vector, most - vector * 3) if vectors else most
        torch.manual_seed(number)
        residual = dropout or number % 3 == 0
        wide = number % 2 == 0
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        x, r = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(dtype)
        weight, bias = (torch.randn(cols).to(acc if wide else dtype) for _ in range(2))
        y, new, mean, rstd = (
            torch.full_like(x, float("nan")),
            torch.full_like(x, float("nan")),
            torch.zeros(rows, dtype=acc),
            torch.zeros(rows, dtype=acc),
        )
        weight_code = (0 if dtype == torch.float64 else 1) if wide else code
        params = struct.pack("<8Q4q2d3iIdQ", x.data_ptr(), r.data_ptr() if residual else 0, weight.data_ptr(), bias.data_ptr(), y.data_ptr(),
                             new.data_ptr() if residual else 0, 0 if norm else mean.data_ptr(), rstd.data_ptr(), rows, cols, cols, cols, 1e-5, 0.0,
                             code, weight_code, norm, *dropout_fields(dropout, seed))  # fmt: skip
        with core.registered(
            x,
            r,
            weight,
            bias,
            y,
            new,
            mean,
            rstd,
            seed,
            names=["x", "residual", "weight", "bias", "y", "new_residual", "mean", "rstd", "seed"],
        ):
            result = module.launch(name, 2, threads, [params], seed=number)
        assert not result.fault, result.message
        s = ((dropped(x) if dropout else x).double() + r.double()).to(dtype) if residual else x
        if residual:
            assert torch.equal(new, s)
        s = s.double()
        if norm == 0:
            s = s - s.mean(-1, keepdim=True)
        want = s * torch.rsqrt((s * s).mean(-1, keepdim=True) + 1e-5) * weight.double() + bias.double()
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert torch.allclose(y.double(), want, rtol=tolerance, atol=tolerance), name


BWD_NAME = re.compile(
    r"norm_bwd_(long_|columns_|reduce_)?kernelI(d|f|13__nv_bfloat16|6__half)(?:LNS_8NormKindE([01])ELi(\d+)E(?:Li(\d+)E)?(?:Lb([01])ELb([01])E)?)?E"
)


@pytest.mark.parametrize("dropout", (False, True))
def test_all_backward_kernels(nvcc, dropout):
    module = compiled(nvcc, "norm_bwd_dropout" if dropout else "norm_bwd")
    assert len(module.kernels()) == (56 if dropout else 76)
    seed = torch.tensor(SEED)
    for number, name in enumerate(module.kernels()):
        form, kind, norm, vector, vectors, block, flag = BWD_NAME.search(name).groups()
        assert flag in (None, str(int(dropout)))
        dtype, code = TYPES[kind]
        norm, vector, block, form = int(norm or 0), int(vector or 1), block == "1", form or ""
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        threads = 64 if block else 128
        cols = vector * int(vectors) * (threads if block else 32) - 3 * vector if vectors else 75 * vector
        rows, blocks = 7, 3
        torch.manual_seed(number)
        x, dy, dresidual = (torch.randn(rows, cols).to(dtype) for _ in range(3))
        weight = torch.randn(cols).to(dtype)
        mean = x.to(acc).mean(-1) if norm == 0 else torch.zeros(rows, dtype=acc)
        rstd = torch.rsqrt(((x.to(acc) - mean[:, None]) ** 2).mean(-1) + 1e-5)
        dx_dropped = torch.full_like(x, float("nan"))
        dx, dweight, dbias = (
            torch.full_like(x, float("nan")),
            torch.full((cols,), float("nan"), dtype=dtype),
            torch.full((cols,), float("nan"), dtype=dtype),
        )
        sums = 2 if norm == 0 else 1
        partial = torch.full((sums, blocks, cols), float("nan"), dtype=acc)
        if form == "reduce_":
            partial = torch.randn(sums, blocks, cols, dtype=acc)
        # Every pointer but the bias of rms_norm, in the order of NormBwdParams.
        tensors = [dy, dresidual, x, weight, mean, rstd, dx, dweight, dbias, partial]
        pointers = [0 if (t is mean and norm == 1) or (t is dbias and norm == 1) else t.data_ptr() for t in tensors]
        rest = (blocks, rows, cols, cols, cols, cols, 0.5, code, code, norm, *dropout_fields(dropout, seed))
        params = struct.pack("<10Q6qd3iIdQQ", *pointers, *rest, dx_dropped.data_ptr() if dropout else 0)
        pieces = -(-cols // (32 * vector))
        grid = {"columns_": (pieces, blocks), "reduce_": (-(-cols // 32), sums)}.get(form, blocks)
        with core.registered(*tensors, seed, dx_dropped):
            result = module.launch(
                name, grid, (32, 8) if form in ("columns_", "reduce_") else threads, [params], seed=number
            )
        assert not result.fault, (name, result.message)

        tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        close = lambda a, b, t=tolerance: torch.allclose(a.double(), b.double(), rtol=t, atol=t)
        xhat = (x.double() - mean.double()[:, None]) * rstd.double()[:, None]
        g = dy.double() * (weight.double() + 0.5)
        if form in ("", "long_"):
            want = g - xhat * (g * xhat).mean(-1, keepdim=True) - (g.mean(-1, keepdim=True) if norm == 0 else 0)
            want = want * rstd.double()[:, None] + dresidual.double()
            assert close(dx, want), name
            assert not dropout or close(dx_dropped, dropped(want)), name
        if form in ("", "columns_"):
            # Of the sums only float32 accumulation is lost: the operands are exact in it.
            assert torch.allclose(partial[0].sum(0).double(), (dy.double() * xhat).sum(0), atol=1e-4), name
            assert norm == 1 or torch.allclose(partial[1].sum(0).double(), dy.double().sum(0), atol=1e-4), name
        if form == "reduce_":
            assert close(dweight, partial[0].sum(0)) and close(dbias, partial[1].sum(0)), name
