"""What is particular to gelu and silu with a bias; test_battery.py has the rest, test_gated.py their accuracy."""

import pytest
import torch
import torch.nn.functional as torch_functional

import llmkernels
from llmkernels import functional
from llmkernels.ops.activation import cases, reference
from llmkernels.ops.activation.cases import ActivationCase
from llmkernels.testing.battery import failures, judge, judge_results
from llmkernels.testing.inputs import outputs_and_gradients, short_name
from tests.support import check_exported

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def call(activation, input, bias=None, backend=None):
    settings = {"approximate": "tanh"} if activation == "gelu_tanh" else {}
    return getattr(functional, activation[:4])(input, bias, **settings, backend=backend)


def formula(activation, input, bias=None):
    """torch's own functions."""
    return reference.ACTIVATIONS[activation](input if bias is None else input + bias)


# Deliberately wrong formulas: the rule has to reject each of them.

WRONG = {
    "bias forgotten": ("silu", lambda x, b: torch_functional.silu(x + 0.0 * b)),
    "bias after the activation": ("gelu", lambda x, b: torch_functional.gelu(x) + b),
    "bias subtracted": ("silu", lambda x, b: torch_functional.silu(x - b)),
    "silu for gelu": ("gelu", lambda x, b: torch_functional.silu(x + b)),
    "sigmoid of 1.702 x for gelu": ("gelu", lambda x, b: (x + b) * torch.sigmoid(1.702 * (x + b))),
    "sigmoid without x": ("silu", lambda x, b: torch.sigmoid(x + b)),
    "two percent off": ("silu", lambda x, b: torch_functional.silu(x + b) * 1.02),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=short_name)
def test_rule_rejects_wrong_variants(dtype, wrong):
    op, variant = WRONG[wrong]
    case = ActivationCase(op, (64, 40), dtype)
    inputs = cases.make_inputs(case)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    wide = lambda leaves: (variant(leaves.input.to(acc), leaves.bias.to(acc)).to(dtype),)
    assert failures(judge_results(cases, case, inputs, outputs_and_gradients(inputs, wide))) != []


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
@pytest.mark.parametrize("op", cases.OPS)
def test_rule_rejects_wrong_gradients(op, dtype):
    case = ActivationCase(op, (64, 40), dtype)
    inputs = cases.make_inputs(case)
    right = outputs_and_gradients(inputs, lambda leaves: cases.call(case, leaves, "torch"))
    assert failures(judge_results(cases, case, inputs, right)) == []
    wide = right["dinput"].float()
    wrong = {
        "last row forgotten": {"dbias": wide[:-1].sum(0)},
        "last slab forgotten": {"dbias": wide[:48].sum(0)},
        "mean for sum": {"dbias": wide.mean(0)},
        "dy forgotten": {"dinput": wide / inputs.dy.float()},
    }
    for name, results in wrong.items():
        results = right | {key: value.to(dtype) for key, value in results.items()}
        assert failures(judge_results(cases, case, inputs, results)) != [], name


@pytest.mark.parametrize("rows", (1, 15, 16, 17, 64, 65, 129, 300))
def test_sums_over_any_number_of_rows(rows, backend, device, poison):
    for dtype in (torch.float32, torch.bfloat16):
        assert failures(judge(cases, ActivationCase("gelu", (rows, 40), dtype), backend, device)) == []


@every_activation
def test_functorch(activation):
    input, bias = torch.randn(6, 24), torch.randn(24)
    tangents = (torch.ones_like(input), torch.randn_like(bias))
    transforms = {
        "grad": lambda f: torch.func.grad(lambda x, b: f(x, b).cos().sum(), (0, 1))(input, bias),
        "vmap": lambda f: torch.func.vmap(f, (0, None))(torch.stack((input, -input)), bias),
        "jvp": lambda f: torch.func.jvp(f, (input, bias), tangents),
        "hessian": lambda f: torch.func.hessian(lambda b: f(input, b).cos().sum())(bias),
    }
    for name, transform in transforms.items():
        ours, theirs = (
            transform(lambda *tensors, function=function: function(activation, *tensors))
            for function in (call, formula)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@every_activation
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_special_values_propagate_as_in_torch(activation, value, backend, device):
    """As in torch's fp64: its gelu(inf) in fp32 is NaN or Inf, with or without oneDNN."""
    if activation == "gelu" and backend == "torch" and value == float("inf"):
        pytest.skip("torch: gelu(inf) is what torch has")
    input, bias = torch.randn(4, 40, device=device), torch.randn(40, device=device)
    input[1, 0] = bias[39] = value
    wide = (input.double().requires_grad_(), bias.double().requires_grad_())
    theirs = formula(activation, *wide)
    tensors = (input.requires_grad_(), bias.requires_grad_())
    ours = call(activation, *tensors, backend)
    torch.testing.assert_close(ours, theirs.float(), equal_nan=True)
    expected = torch.autograd.grad(theirs, wide, torch.ones_like(theirs))
    for grad, other in zip(torch.autograd.grad(ours, tensors, torch.ones_like(ours)), expected, strict=True):
        torch.testing.assert_close(grad, other.float(), equal_nan=True)


@every_activation
@pytest.mark.parametrize("bias_dtype", cases.DTYPES, ids=short_name)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short_name)
def test_dtypes_promote_as_torchs_sum_does(activation, dtype, bias_dtype):
    input = torch.randn(4, 24).to(dtype).requires_grad_()
    bias = torch.randn(24).to(bias_dtype).requires_grad_()
    ours, theirs = call(activation, input, bias), formula(activation, input, bias)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)
    for grad, leaf in zip(torch.autograd.grad(ours.sum(), (input, bias)), (input, bias), strict=True):
        assert grad.dtype == leaf.dtype


def test_raw_ops_pass_opcheck(raw):
    input, dy, bias = (
        torch.randn(5, 24, device=raw.device),
        torch.randn(5, 24, device=raw.device),
        torch.randn(24, device=raw.device),
    )
    for given in (bias, None):
        raw.check(raw.ops.activation_fwd.default, (input, given, "silu"))
        for wanted in ([True, True], [False, True], [True, False]):
            arguments = (dy, input, given, "gelu", wanted)
            raw.check(raw.ops.activation_bwd.default, arguments)


def test_public_op_and_export(tmp_path):
    class Module(torch.nn.Module):
        def forward(self, input, bias):
            return functional.gelu(input, bias, approximate="tanh") + functional.silu(input)

    arguments = (torch.randn(3, 16), torch.randn(16))
    program = torch.export.export(Module(), arguments, dynamic_shapes=({0: torch.export.Dim("rows")}, {}))
    check_exported(program, "activation_fwd", arguments, Module()(*arguments), tmp_path)
    public = torch.ops.llmkernels
    torch.testing.assert_close(public.gelu(*arguments, approximate="tanh"), call("gelu_tanh", *arguments))
    torch.testing.assert_close(public.silu(arguments[0]), call("silu", arguments[0]))


def test_bad_arguments_have_one_clear_message():
    x, b = torch.randn(2, 8), torch.randn(8)
    wrong = [
        (ValueError, r"gelu: bias has shape \(4,\), expected \(8,\)", lambda: functional.gelu(x, b[:4])),
        (ValueError, r"silu: bias has shape \(1, 8\), expected \(8,\)", lambda: functional.silu(x, b[None])),
        (ValueError, r"silu: bias has shape \(1,\), expected \(C,\) with", lambda: functional.silu(x[0, 0], b[:1])),
        (TypeError, "gelu: input has dtype torch.int64", lambda: functional.gelu(x.long(), b)),
        (TypeError, "silu: bias has dtype torch.complex64", lambda: functional.silu(x, b + 0j)),
        (ValueError, "silu: bias is on meta, expected cpu", lambda: functional.silu(x, b.to("meta"))),
        (ValueError, "gelu: approximate is 'erf', expected", lambda: functional.gelu(x, approximate="erf")),
        (llmkernels.NoBackendError, "cuda: input is on the CPU", lambda: functional.silu(x, b, backend="cuda")),
    ]
    for error, message, wrong_call in wrong:
        with pytest.raises(error, match=message):
            wrong_call()


def test_raw_ops_never_crash():
    if llmkernels.backends()["cpu"] is not None:
        pytest.skip("cpu: " + llmkernels.backends()["cpu"])
    raw, x, b = torch.ops.llmkernels_cpu, torch.randn(3, 8), torch.randn(8)
    wrong = (
        lambda: raw.activation_fwd(x, b[:4], "silu"),
        lambda: raw.activation_fwd(x, b.half(), "silu"),
        lambda: raw.activation_fwd(x, b, "selu"),
        lambda: raw.activation_fwd(x.long(), None, "silu"),
        lambda: raw.activation_bwd(x[:2], x, b, "silu", [True, True]),
        lambda: raw.activation_bwd(x.half(), x, b, "silu", [True, True]),
    )
    for wrong_call in wrong:
        with pytest.raises((ValueError, TypeError), match="expected"):
            wrong_call()
