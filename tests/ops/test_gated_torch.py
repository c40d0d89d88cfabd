"""The gated family as part of torch: ops, export, promotion, packed and strange tensors, errors, the module."""

import pytest
import torch

import llmkernels
from llmkernels import functional, nn
from llmkernels.ops.gated import cases
from llmkernels.testing.inputs import short_name
from tests.ops.test_gated import ACTIVATIONS, call, every_activation, formula
from tests.support import check_exported


@every_activation
def test_functorch(activation):
    gate, up = (torch.randn(6, 24, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    tangents = (torch.ones_like(gate), torch.randn_like(up))
    transforms = {
        "grad": lambda f: torch.func.grad(lambda g, u: f(g, u).cos().sum(), (0, 1))(gate, up),
        "vmap": lambda f: torch.func.vmap(f, (0, None))(gate, up[0]),
        "jvp": lambda f: torch.func.jvp(f, (gate, up), tangents),
        "jvp packed": lambda f: torch.func.jvp(f, (gate,), tangents[:1]),
        "hessian": lambda f: torch.func.hessian(lambda g: f(g, up[:1]).cos().sum())(gate[:1]),
    }
    for name, transform in transforms.items():
        ours, theirs = (
            transform(lambda *tensors, function=function: function(activation, *tensors))
            for function in (call, formula)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@every_activation
def test_packed_has_one_gradient_of_first_and_second_order(activation, backend, device):
    packed = torch.randn(3, 10, dtype=torch.float64, device=device, requires_grad=True)
    function = lambda packed: call(activation, packed, backend=backend)
    assert torch.autograd.gradcheck(function, packed) and torch.autograd.gradgradcheck(function, packed)


@every_activation
def test_packed_equals_two_views_of_it(activation, backend, device, poison):
    wide = torch.randn(5, 7, 50, device=device)
    for packed in (wide, wide[:, 1::2], wide[..., 3:-3], wide.transpose(0, 1), wide[0, 0]):
        packed = packed.detach().requires_grad_()
        cols = packed.shape[-1] // 2
        outputs = (
            call(activation, packed, None, backend),
            call(activation, packed[..., :cols], packed[..., cols:], backend),
        )
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*(torch.autograd.grad(y.cos().sum(), packed)[0] for y in outputs))


@every_activation
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_special_values_propagate_as_in_torch(activation, value, backend, device):
    """As in torch's fp64: its gelu(inf) in fp32 is NaN or Inf, with or without oneDNN."""
    if activation == "gelu" and backend == "torch" and value == float("inf"):
        pytest.skip("torch: gelu(inf) is what torch has")
    gate, up = torch.randn(4, 40, device=device), torch.randn(4, 40, device=device)
    gate[1, 0] = up[2, 39] = gate[3, 5] = up[3, 5] = value
    gate[3, 7] = 0.0
    wide = (gate.double().requires_grad_(), up.double().requires_grad_())
    theirs = formula(activation, *wide)
    tensors = (gate.requires_grad_(), up.requires_grad_())
    ours = call(activation, *tensors, backend)
    torch.testing.assert_close(ours, theirs.float(), equal_nan=True)
    expected = torch.autograd.grad(theirs, wide, torch.ones_like(theirs))
    for grad, other in zip(torch.autograd.grad(ours, tensors, torch.ones_like(ours)), expected, strict=True):
        torch.testing.assert_close(grad, other.float(), equal_nan=True)


@pytest.mark.parametrize("op", cases.OPS)
def test_public_op_is_differentiable_and_checked(op):
    public = getattr(torch.ops.llmkernels, op)
    gate, up = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    for arguments in ((gate, up), (gate,)):
        torch.testing.assert_close(public(*arguments), getattr(functional, op)(*arguments))
        torch.library.opcheck(public.default, arguments, test_utils=("test_schema", "test_faketensor"))
    public(gate, up).sum().backward()
    assert gate.grad is not None and up.grad is not None
    assert torch.ops.llmkernels.geglu(gate, up, approximate="tanh").shape == gate.shape


def test_raw_ops_pass_opcheck(raw):
    gate, up, packed, dy = (torch.randn(5, cols, device=raw.device) for cols in (24, 24, 48, 24))
    for activation in ACTIVATIONS:
        for given in ((gate, up), (packed, None)):
            raw.check(raw.ops.gated_fwd.default, (*given, activation))
    for wanted in ([True, True], [False, True], [True, False]):
        for given in ((gate, up), (packed, None)):
            raw.check(raw.ops.gated_bwd.default, (dy, *given, "silu", wanted))


def test_export_is_portable(tmp_path):
    """Exported here, it runs where nothing is compiled, on the torch backend."""
    module, x = nn.SwiGLU(16, 24, activation="gelu"), torch.randn(3, 16)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    rows = torch.cat([x, x])
    check_exported(program, "gated_fwd", (rows,), module(rows).detach(), tmp_path)


@every_activation
@pytest.mark.parametrize("gate_dtype", cases.DTYPES, ids=short_name)
@pytest.mark.parametrize("up_dtype", cases.DTYPES, ids=short_name)
def test_dtypes_promote_as_torchs_product_does(activation, gate_dtype, up_dtype):
    gate, up = torch.randn(4, 24).to(gate_dtype), torch.randn(4, 24).to(up_dtype)
    ours, theirs = call(activation, gate, up), formula(activation, gate, up)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(activation, gate, up).dtype == formula(activation, gate, up).dtype


def test_bad_arguments_have_one_clear_message():
    x = torch.randn(2, 8)
    wrong = [
        (ValueError, r"swiglu: up has shape \(2, 4\), expected \(2, 8\)", lambda: functional.swiglu(x, x[:, :4])),
        (ValueError, r"geglu: packed gate has shape \(2, 7\), expected an even", lambda: functional.geglu(x[:, :7])),
        (ValueError, r"reglu: packed gate has shape \(\)", lambda: functional.reglu(torch.tensor(1.0))),
        (TypeError, "swiglu: gate has dtype torch.int64", lambda: functional.swiglu(x.long(), x)),
        (TypeError, "reglu: up has dtype torch.complex64", lambda: functional.reglu(x, x + 0j)),
        (ValueError, "swiglu: up is on meta, expected cpu", lambda: functional.swiglu(x, x.to("meta"))),
        (ValueError, "geglu: approximate is 'erf', expected", lambda: functional.geglu(x, x, approximate="erf")),
        (ValueError, "unknown backend 'gpu'", lambda: functional.swiglu(x, x, backend="gpu")),
        (llmkernels.NoBackendError, "cuda: input is on the CPU", lambda: functional.swiglu(x, x, backend="cuda")),
        (ValueError, "SwiGLU: activation is 'tanh', expected one of silu", lambda: nn.SwiGLU(4, 8, activation="tanh")),
    ]  # fmt: skip
    for error, message, wrong_call in wrong:
        with pytest.raises(error, match=message):
            wrong_call()


def test_raw_ops_never_crash():
    if llmkernels.backends()["cpu"] is not None:
        pytest.skip("cpu: " + llmkernels.backends()["cpu"])
    raw, x = torch.ops.llmkernels_cpu, torch.randn(3, 8)
    wrong = (
        lambda: raw.gated_fwd(x, x[:2], "silu"),
        lambda: raw.gated_fwd(x, x.half(), "silu"),
        lambda: raw.gated_fwd(x, x, "selu"),
        lambda: raw.gated_fwd(x[:, :7], None, "silu"),
        lambda: raw.gated_fwd(x.long(), x.long(), "silu"),
        lambda: raw.gated_bwd(x[:2], x, x, "silu", [True, True]),
        lambda: raw.gated_bwd(x, x, None, "silu", [True, True]),
    )
    for wrong_call in wrong:
        with pytest.raises((ValueError, TypeError), match="expected"):
            wrong_call()


@every_activation
@pytest.mark.parametrize("bias", (False, True))
def test_module_is_the_mlp(activation, bias):
    module = nn.SwiGLU(16, 24, bias, activation=activation)
    names = [
        f"{name}_proj.{kind}"
        for name in ("gate", "up", "down")
        for kind in (("weight", "bias") if bias else ("weight",))
    ]
    assert list(module.state_dict()) == names
    x = torch.randn(2, 3, 16)
    expected = module.down_proj(formula(activation, module.gate_proj(x), module.up_proj(x)))
    torch.testing.assert_close(module(x), expected)
    assert nn.SwiGLU(4, 8, dtype=torch.bfloat16, device="meta").up_proj.weight.dtype == torch.bfloat16
    assert f"activation={activation!r}" in repr(module)
