"""What is particular to softmax and log_softmax; test_battery.py has the rest."""

import pytest
import torch

import llmkernels
from llmkernels import functional
from llmkernels.ops.softmax import cases, reference
from llmkernels.ops.softmax.cases import SoftmaxCase
from llmkernels.testing.battery import evaluate, failures, judge_results
from llmkernels.testing.inputs import outputs_and_gradients, short_name
from tests.support import check_exported

every_op = pytest.mark.parametrize("op", cases.OPS)
INF = float("inf")


# Deliberately wrong formulas: the rule has to reject each of them.

WRONG = {
    "scale forgotten": lambda x, mask: torch.softmax(x + mask, -1),
    "mask scaled too": lambda x, mask: torch.softmax(0.5 * (x + mask), -1),
    "mask forgotten": lambda x, mask: torch.softmax(0.5 * x + 0.0 * mask, -1),
    "mask multiplied": lambda x, mask: torch.softmax(0.5 * x * mask, -1),
    "not normalised": lambda x, mask: (0.5 * x + mask - (0.5 * x + mask).amax(-1, keepdim=True)).exp(),
    "one column left out of the sum": lambda x, mask: (s := (0.5 * x + mask).exp()) / s[..., 1:].sum(-1, keepdim=True),
    "power of two": lambda x, mask: (s := torch.exp2(0.5 * x + mask)) / s.sum(-1, keepdim=True),
    "five percent off": lambda x, mask: torch.softmax(0.5 * x + mask, -1) * 1.05,
}


@every_op
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short_name)
def test_rule_rejects_wrong_variants(dtype, wrong, op):
    case = SoftmaxCase(op, (64, 40), dtype, 0.5, "bias", (40,))
    inputs = cases.make_inputs(case)

    def variant(leaves):
        y = WRONG[wrong](leaves.x.to(torch.promote_types(dtype, torch.float32)), leaves.mask)
        return ((y if op == "softmax" else y.log()).to(dtype),)

    assert failures(judge_results(cases, case, inputs, outputs_and_gradients(inputs, variant))) != []


@every_op
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
def test_rule_rejects_wrong_gradients(dtype, op):
    case = SoftmaxCase(op, (64, 40), dtype, 0.5, "bias", (40,))
    inputs = cases.make_inputs(case)
    right = evaluate(cases, case, inputs, "torch")
    assert failures(judge_results(cases, case, inputs, right)) == []
    y, dy = right["y"].float(), inputs.dy.float()
    p = y.exp() if op == "log_softmax" else y
    wrong = {
        "sum forgotten": {"dx": 0.5 * (dy if op == "log_softmax" else p * dy)},
        "scale forgotten": {"dx": 2.0 * right["dx"]},
        "the sum of the other op": {"dx": 0.5 * p * (dy - (dy.sum(-1, keepdim=True)))},
        "one row of the mask": {"dmask": 2.0 * right["dx"][0]},
    }
    for name, results in wrong.items():
        results = {key: value.to(dtype) for key, value in results.items()}
        assert failures(judge_results(cases, case, inputs, right | results)) != [], name


@every_op
def test_equals_torch(op, backend, device):
    x = torch.randn(4, 5, 6, 7, device=device)
    theirs = getattr(torch, op)
    ours = lambda *args, **options: getattr(functional, op)(*args, **options, backend=backend)
    for dim in (-1, 0, 1, 2, 3, -4):
        torch.testing.assert_close(ours(x, dim), theirs(x, dim))
    torch.testing.assert_close(ours(x.half(), 1, dtype=torch.float32), theirs(x.half(), 1, dtype=torch.float32))
    torch.testing.assert_close(ours(x[0, 0, 0, 0]), theirs(x[0, 0, 0, 0], -1))
    mask = torch.rand(5, 1, 7, device=device) < 0.7
    mask[..., 0] = True
    across = torch.ones(4, 1, 6, 7, dtype=torch.bool, device=device)
    across[:, :, 2:, 3] = False
    torch.testing.assert_close(ours(x, 2, mask=across), theirs(x.masked_fill(~across, -INF), 2))
    torch.testing.assert_close(ours(x, scale=0.3, mask=mask), theirs((0.3 * x).masked_fill(~mask, -INF), -1))
    bias = torch.randn(6, 7, device=device)
    torch.testing.assert_close(ours(x, mask=bias.double()), theirs(x + bias, -1))


@every_op
def test_a_row_of_which_nothing_is_left(op, backend, device):
    """0, not torch's NaN, and no gradient; also where what is masked is NaN or infinite."""
    x = torch.randn(3, 2100, device=device)
    x[1, 5], x[1, 2099], x[2, 7] = float("nan"), INF, INF
    keep = torch.ones(3, 2100, dtype=torch.bool, device=device)
    keep[1], keep[2, 7] = False, False
    for cols in (40, 2100):
        keep[1, :cols] = keep[2, 7] = False
        given = x[:, -cols:].clone().requires_grad_() if cols < 2100 else x.clone().requires_grad_()
        mask = keep[:, -cols:] if cols < 2100 else keep
        y = getattr(functional, op)(given, mask=mask, backend=backend)
        assert (y[1] == (0.0 if op == "softmax" else -INF)).all()
        (grad,) = torch.autograd.grad(y, given, torch.randn_like(y))
        assert (grad[1] == 0.0).all() and torch.isfinite(grad[0]).all()
        if cols == 2100:
            assert y[2, 7] == (0.0 if op == "softmax" else -INF) and torch.isfinite(grad[2]).all() and grad[2, 7] == 0.0
            sums = (y if op == "softmax" else y.exp()).sum(-1)
            torch.testing.assert_close(sums, torch.tensor([1.0, 0.0, 1.0], device=device))


@every_op
@pytest.mark.parametrize("cols", (40, 3000))
def test_special_values_as_in_torch(op, cols, backend, device):
    """A NaN or +inf anywhere makes its row NaN; -inf takes no part."""
    x = torch.randn(4, cols, device=device)
    x[0, 3], x[1, cols - 1], x[2, 5] = float("nan"), INF, -INF
    ours, theirs = getattr(functional, op)(x, backend=backend), getattr(torch, op)(x, -1)
    nan = torch.isnan(theirs)
    assert torch.equal(torch.isnan(ours).any(-1), nan.any(-1))
    torch.testing.assert_close(ours[2:], theirs[2:])


@every_op
def test_rows_sum_to_one_and_shifts_do_not_matter(op, backend, device):
    x = torch.randn(5, 300, device=device) * 4.0
    y = getattr(functional, op)(x, backend=backend)
    total = (y if op == "softmax" else y.exp()).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    shifted = getattr(functional, op)((x * 64.0).round() / 64.0 + 512.0, backend=backend)
    torch.testing.assert_close(shifted, getattr(functional, op)((x * 64.0).round() / 64.0, backend=backend))


@every_op
def test_functorch(op):
    x, bias = torch.randn(3, 8), torch.randn(8)
    ours = lambda x, bias: getattr(functional, op)(x, scale=0.5, mask=bias)
    theirs = lambda x, bias: getattr(torch, op)(0.5 * x + bias, -1)
    transforms = {
        "grad": lambda f: torch.func.grad(lambda x, b: f(x, b).cos().sum(), (0, 1))(x, bias),
        "vmap": lambda f: torch.func.vmap(f, (0, None))(x, bias),
        "jvp": lambda f: torch.func.jvp(f, (x, bias), (torch.ones_like(x), torch.ones_like(bias))),
        "hessian": lambda f: torch.func.hessian(lambda x: f(x, bias).cos().sum())(x),
    }
    for name, transform in transforms.items():
        torch.testing.assert_close(transform(ours), transform(theirs), msg=lambda m, name=name: f"{name}: {m}")


def test_mask_of_more_digits_has_an_exact_sum(backend, device):
    """An fp32 bias of bf16 scores is given an fp32 gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 40, generator=generator).bfloat16().to(device)
    bias = torch.randn(3, 1, 40, generator=generator).to(device).requires_grad_()
    y = functional.softmax(x, mask=bias, backend=backend)
    (grad,) = torch.autograd.grad(y.float().square().sum(), bias)
    assert grad.dtype == torch.float32 and grad.shape == bias.shape
    torch.testing.assert_close(grad.sum(-1), torch.zeros(3, 1, device=device), rtol=0.0, atol=2e-3)


def test_raw_ops_pass_opcheck(raw):
    x, dy = torch.randn(5, 24, device=raw.device), torch.randn(5, 24, device=raw.device)
    for mask in (None, x > 0.0, x[0]):
        raw.check(raw.ops.softmax_fwd.default, (x, mask, 0.5, False))
    for wanted in ([True, True], [False, True], [True, False]):
        raw.check(raw.ops.softmax_bwd.default, (dy, x, 0.5, True, wanted))


@every_op
def test_public_op_is_differentiable_and_checked(op):
    public, x = getattr(torch.ops.llmkernels, op), torch.randn(3, 8, requires_grad=True)
    options = {"scale": 0.5, "mask": torch.randn(8)}
    torch.testing.assert_close(public(x, 0, scale=0.5), getattr(functional, op)(x, 0, scale=0.5))
    torch.library.opcheck(public.default, (x,), options, test_utils=("test_schema", "test_faketensor"))
    public(x, **options).square().sum().backward()
    assert x.grad is not None


def test_export_is_portable(tmp_path):
    class Module(torch.nn.Module):
        def forward(self, x):
            return functional.softmax(x, scale=0.5)

    program = torch.export.export(Module(), (torch.randn(4, 8),))
    x = torch.randn(4, 8)
    check_exported(program, "softmax_fwd", (x,), torch.softmax(0.5 * x, -1), tmp_path)


def test_bad_arguments_have_one_clear_message():
    x = torch.randn(2, 8)
    wrong = [
        (TypeError, "softmax: input has dtype torch.int64, expected", lambda: functional.softmax(x.long())),
        (TypeError, "log_softmax: dtype is torch.int32", lambda: functional.log_softmax(x, dtype=torch.int)),
        (ValueError, "softmax: dim is 2, expected one of the 2", lambda: functional.softmax(x, 2)),
        (TypeError, "softmax: mask has dtype torch.int64, expected bool", lambda: functional.softmax(x, mask=x.long())),
        (ValueError, r"softmax: mask has shape \(2, 7\), expected one that expands to \(2, 8\)",
         lambda: functional.softmax(x, mask=x[:, :7])),
        (ValueError, r"log_softmax: mask has shape \(1, 2, 8\)", lambda: functional.log_softmax(x, mask=x[None])),
        (ValueError, "softmax: mask is on meta, expected cpu", lambda: functional.softmax(x, mask=x.to("meta"))),
        (ValueError, "unknown backend 'gpu'", lambda: functional.softmax(x, backend="gpu")),
        (llmkernels.NoBackendError, "cuda: input is on the CPU", lambda: functional.softmax(x, backend="cuda")),
    ]  # fmt: skip
    for error, message, wrong_call in wrong:
        with pytest.raises(error, match=message):
            wrong_call()


def test_raw_ops_never_crash():
    if llmkernels.backends()["cpu"] is not None:
        pytest.skip("cpu: " + llmkernels.backends()["cpu"])
    raw, x = torch.ops.llmkernels_cpu, torch.randn(3, 8)
    wrong = (
        lambda: raw.softmax_fwd(x.long(), None, 1.0, False),
        lambda: raw.softmax_fwd(x, x[:, :7], 1.0, False),
        lambda: raw.softmax_fwd(x, x[None], 1.0, False),
        lambda: raw.softmax_fwd(x, x.half(), 1.0, False),
        lambda: raw.softmax_bwd(x[:2], x, 1.0, False, [True, True]),
        lambda: raw.softmax_bwd(x.half(), x, 1.0, False, [True, True]),
    )
    for wrong_call in wrong:
        with pytest.raises((ValueError, TypeError), match="expected"):
            wrong_call()


def test_reference_is_the_op_over_the_last_dimension():
    x, mask = torch.randn(3, 8), torch.rand(3, 8) < 0.8
    torch.testing.assert_close(reference.softmax_fwd(x, mask, 0.5, False), functional.softmax(x, scale=0.5, mask=mask))
