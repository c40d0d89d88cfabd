"""The norm family as part of torch: ops, compile, export, autocast, strange tensors, errors, modules."""

import pytest
import torch
import torch.nn.functional as torch_functional

import llmkernels
from llmkernels import functional, nn
from llmkernels.ops.norm import cases
from llmkernels.testing.battery import baseline, failures, judge_results
from tests.support import check_exported


def make(op, device="cpu", dtype=torch.float32, shape=(6, 24)):
    case = cases.NormCase(op, shape, shape[-1:], dtype)
    return case, cases.make_inputs(case, device)


@pytest.mark.parametrize("op", cases.OPS)
def test_public_op_is_differentiable_and_checked(op):
    case, inputs = make(op)
    public = getattr(torch.ops.llmkernels, op)
    tensors = (inputs.x, inputs.residual) if case.adds else (inputs.x,)
    arguments = (*(t.clone().requires_grad_() for t in tensors), [24], inputs.weight)
    outputs = public(*arguments)
    first = outputs[0] if case.adds else outputs
    expected = getattr(functional, op)(*arguments)
    torch.testing.assert_close(first, expected[0] if case.adds else expected)
    first.sum().backward()
    assert arguments[0].grad is not None
    torch.library.opcheck(public.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_raw_ops_pass_opcheck(raw):
    x, dy, residual = (torch.randn(5, 24, device=raw.device) for _ in range(3))
    weight, bias = torch.randn(24, device=raw.device), torch.randn(24, device=raw.device)
    mean, rstd = x.mean(-1), torch.rsqrt(x.var(-1) + 1e-5)
    for arguments in ((x, None, weight, bias, [24], 1e-5), (x, residual, None, None, [24], 1e-5)):
        raw.check(raw.ops.layer_norm_fwd.default, arguments)
    for wanted in ([True, True, True], [False, True, False], [True, False, False]):
        arguments = (dy, residual, x, weight, mean, rstd, [24], wanted)
        raw.check(raw.ops.layer_norm_bwd.default, arguments)
    raw.check(raw.ops.rms_norm_fwd.default, (x, residual, weight, [24], 1e-5, 1.0))
    for wanted in ([True, True], [False, True]):
        arguments = (dy, None, x, weight, rstd, [24], 0.0, wanted)
        raw.check(raw.ops.rms_norm_bwd.default, arguments)


def test_export_is_portable(tmp_path):
    """Exported here, it runs where nothing is compiled, on the torch backend."""
    module = torch.nn.Sequential(nn.LayerNorm(24), nn.RMSNorm(24, weight_offset=1.0))
    x = torch.randn(3, 24)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    rows = torch.cat([x, x])
    for op in ("layer_norm_fwd", "rms_norm_fwd"):
        check_exported(program, op, (rows,), module(rows).detach(), tmp_path)


@pytest.mark.parametrize("op", ("layer_norm", "rms_norm"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_cpu_autocast_equals_torch(op, dtype):
    _, inputs = make(op, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours = getattr(functional, op)(inputs.x, (24,), inputs.weight)
        theirs = getattr(torch_functional, op)(inputs.x, (24,), inputs.weight)
    assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_eps_none_and_mixed_weight_dtypes_equal_torch(dtype):
    x = torch.randn(4, 24).to(dtype) * 1e-4
    for weight_dtype in cases.DTYPES:
        weight = torch.randn(24).to(weight_dtype)
        ours, theirs = functional.rms_norm(x, (24,), weight), torch_functional.rms_norm(x, (24,), weight)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(
            ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-7 if dtype != torch.float64 else 1e-9
        )


@pytest.mark.parametrize("op", ("layer_norm", "rms_norm"))
def test_expanded_rows(op, backend, device, poison):
    row = torch.randn(1, 24, device=device)
    y = getattr(functional, op)(row.expand(5, 24), (24,), backend=backend)
    torch.testing.assert_close(
        y, getattr(torch_functional, op)(row, (24,), eps=None if op == "rms_norm" else 1e-5).expand(5, 24)
    )


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("op", ("layer_norm", "rms_norm"))
def test_special_values_propagate_as_in_torch(op, value, backend, device):
    x = torch.randn(4, 40, device=device)
    x[1, 0] = x[2, 39] = value
    ours = getattr(functional, op)(x, (40,), backend=backend)
    theirs = getattr(torch_functional, op)(x, (40,))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


# Errors.


def test_bad_arguments_have_one_clear_message():
    x, weight = torch.randn(2, 8), torch.randn(8)
    wrong = [
        (ValueError, r"input has shape \(2, 8\), expected \(\*, 7\)", lambda: functional.layer_norm(x, (7,))),
        (ValueError, r"normalized_shape is \(\)", lambda: functional.rms_norm(x, ())),
        (ValueError, r"weight has shape \(4,\), expected \(8,\)", lambda: functional.layer_norm(x, (8,), weight[:4])),
        (ValueError, r"bias has shape \(4,\)", lambda: functional.layer_norm(x, (8,), weight, weight[:4])),
        (TypeError, "input has dtype torch.int64", lambda: functional.rms_norm(x.long(), (8,))),
        (TypeError, "input has dtype torch.complex64", lambda: functional.layer_norm(x + 0j, (8,))),
        (TypeError, "weight has dtype torch.float64, expected torch.float32",
         lambda: functional.layer_norm(x, (8,), weight.double())),
        (TypeError, "weight has dtype torch.int64", lambda: functional.rms_norm(x, (8,), weight.long())),
        (TypeError, "bias has dtype torch.bfloat16, expected torch.float32, the dtype of weight",
         lambda: functional.layer_norm(x.bfloat16(), (8,), weight, weight.bfloat16())),
        (ValueError, "weight is on meta, expected cpu", lambda: functional.rms_norm(x, (8,), weight.to("meta"))),
        (ValueError, r"residual has shape \(1, 8\), expected", lambda: functional.add_rms_norm(x, x[:1], (8,))),
        (ValueError, "weight_offset is 1.0 without a weight", lambda: functional.rms_norm(x, (8,), weight_offset=1.0)),
        (ValueError, "unknown backend 'gpu'", lambda: functional.rms_norm(x, (8,), backend="gpu")),
        (ValueError, "unknown op 'conv'", lambda: llmkernels.explain("conv", x)),
        (llmkernels.NoBackendError, "cuda: input is on the CPU", lambda: functional.rms_norm(x, (8,), backend="cuda")),
    ]  # fmt: skip
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()


def test_raw_ops_never_crash():
    if llmkernels.backends()["cpu"] is not None:
        pytest.skip("cpu: " + llmkernels.backends()["cpu"])
    raw = torch.ops.llmkernels_cpu
    x, weight, stat = torch.randn(3, 8), torch.randn(8), torch.ones(3)
    wrong = (
        lambda: raw.layer_norm_fwd(x, None, weight[:7], None, [8], 1e-5),
        lambda: raw.layer_norm_fwd(x, x[:2], None, None, [8], 1e-5),
        lambda: raw.layer_norm_fwd(x, None, None, weight, [8], 1e-5),
        lambda: raw.layer_norm_fwd(x.long(), None, None, None, [8], 1e-5),
        lambda: raw.layer_norm_fwd(x, None, weight.half(), None, [8], 1e-5),
        lambda: raw.rms_norm_fwd(x, None, None, [7], 1e-5, 0.0),
        lambda: raw.rms_norm_fwd(x, None, None, [], 1e-5, 0.0),
        lambda: raw.rms_norm_fwd(x, None, None, [4, 3, 8], 1e-5, 0.0),
        lambda: raw.layer_norm_bwd(x[:2], None, x, None, stat, stat, [8], [True] * 3),
        lambda: raw.layer_norm_bwd(x, None, x, None, stat[:1], stat, [8], [True] * 3),
        lambda: raw.rms_norm_bwd(x, None, x, None, stat.double(), [8], 0.0, [True] * 2),
    )
    for call in wrong:
        with pytest.raises((ValueError, TypeError), match="expected"):
            call()


# Choice of backend.


def test_overrides_in_order(monkeypatch):
    x = torch.randn(2, 8)
    chosen = lambda **kwargs: llmkernels.explain("layer_norm", x, (8,), **kwargs).chosen
    best = chosen()
    monkeypatch.setenv("LLMKERNELS_BACKEND", "torch")
    assert chosen() == "torch"
    with llmkernels.use_backend("cuda"):
        assert chosen() is None
        assert chosen(backend="torch") == "torch"
        with pytest.raises(llmkernels.NoBackendError):
            functional.layer_norm(x, (8,))
    monkeypatch.setenv("LLMKERNELS_BACKEND", "fastest")
    with pytest.raises(ValueError, match="LLMKERNELS_BACKEND: unknown backend 'fastest'"):
        functional.layer_norm(x, (8,))
    monkeypatch.delenv("LLMKERNELS_BACKEND")
    assert chosen() == best


def test_explain_has_a_line_for_each_backend():
    text = str(llmkernels.explain("rms_norm", torch.randn(2, 8), (8,)))
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["cuda", "cpu", "triton", "torch"]


# Modules.


def test_modules_have_torchs_state_dicts():
    for ours, theirs in ((nn.LayerNorm(24), torch.nn.LayerNorm(24)), (nn.RMSNorm(24), torch.nn.RMSNorm(24))):
        torch.nn.init.normal_(theirs.weight)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(5, 24)
        torch.testing.assert_close(ours(x), theirs(x))
        y, new_residual = ours(x, x)
        torch.testing.assert_close(y, theirs(2 * x))
        assert torch.equal(new_residual, 2 * x)
    gemma = nn.RMSNorm(24, eps=1e-6, weight_offset=1.0)
    assert gemma.weight.abs().max() == 0 and "weight_offset=1.0" in repr(gemma)
    torch.testing.assert_close(gemma(x), torch_functional.rms_norm(x, (24,), eps=1e-6))


def test_mixed_residual_dtypes_promote_as_the_sum_does():
    x, residual = torch.randn(4, 24).bfloat16(), torch.randn(4, 24)
    y, new_residual = functional.add_layer_norm(x, residual, (24,))
    assert y.dtype == new_residual.dtype == torch.float32
    assert torch.equal(new_residual, x + residual)


def test_judge_accepts_a_baseline_of_torch_itself():
    case, inputs = make("layer_norm", shape=(64, 40))
    assert failures(judge_results(cases, case, inputs, baseline(cases, case, inputs))) == []
