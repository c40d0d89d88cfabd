"""layer_norm, rms_norm and their residual adds: the battery of every backend."""

import dataclasses

import pytest
import torch

import llmkernels
from llmkernels.ops.norm import cases, reference
from llmkernels.testing.battery import failures, judge, judge_results
from tests.ptxsim import backend as simulated

DTYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SMALL = [case for case in cases.test_cases() if case.shape in ((5, 33), (7, 40), (3, 4, 6, 8))]


def option_of(case: cases.NormCase) -> str:
    """The word for a case in coverage.toml."""
    if case.cols > 8192:
        return "long_row"
    if case.data != "normal":
        return case.data
    if not case.weight:
        return "no_weight"
    if case.weight_dtype:
        return f"weight_{DTYPE_NAMES[case.weight_dtype]}"
    if case.is_layer_norm and not case.bias:
        return "no_bias"
    if case.weight_offset:
        return "weight_offset"
    return "dims" if len(case.normalized_shape) > 1 else "plain"


@pytest.mark.parametrize("case", cases.test_cases(), ids=str)
def test_matches_fp64_truth(case, backend, device, poison, covers):
    assert failures(judge(cases, case, backend, device)) == []
    for direction in ("fwd", "bwd"):
        covers(case.op, backend, DTYPE_NAMES[case.dtype], option_of(case), direction)


@pytest.mark.parametrize("case", cases.long_row_cases(), ids=str)
def test_long_rows(case, backend, device, poison, covers):
    if backend == "triton" and device == "cpu":
        pytest.skip("triton: rows this long take minutes in the interpreter; test_chunked_rows covers the code path")
    if (reason := simulated.too_slow(backend, case.rows * case.cols)) is not None:
        pytest.skip(reason)
    assert failures(judge(cases, case, backend, device)) == []
    for direction in ("fwd", "bwd"):
        covers(case.op, backend, DTYPE_NAMES[case.dtype], option_of(case), direction)


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("seed", range(5))
def test_reference_is_torch_in_fp64(op, seed):
    case = cases.NormCase(op, (6, 48), (48,), torch.float64)
    inputs = cases.make_inputs(case, seed=seed)
    expected = cases.baseline(case, inputs)
    for name, result in cases.evaluate(case, inputs, "torch").items():
        torch.testing.assert_close(result, expected[name], rtol=1e-12, atol=1e-12)


# Deliberately wrong formulas: the rule has to reject each of them.


def _wrong(case, inputs, *, bessel=False, eps_factor=1.0, scale=1.0, last_column=True, mean_shift=0.0, keep_bias=True):
    def formula(leaves):
        x = leaves.x if not case.adds else leaves.x + leaves.residual
        wide = x.float()
        cols = case.cols if last_column else case.cols - 1
        seen = wide[..., :cols]
        center = seen.mean(-1, keepdim=True) + mean_shift if case.is_layer_norm else 0.0
        squares = (seen - center).square().sum(-1, keepdim=True) / (cols - bessel)
        y = (wide - center) * torch.rsqrt(squares + eps_factor * case.eps) * scale * leaves.weight.float()
        if case.is_layer_norm and keep_bias:
            y = y + leaves.bias.float()
        elif leaves.bias is not None:
            y = y + 0.0 * leaves.bias.float()
        return (y.to(x.dtype), x) if case.adds else (y.to(x.dtype),)

    return cases._gradients(case, inputs, formula)


WRONG = {
    "bessel_variance": {"bessel": True},
    "eps_times_ten": {"eps_factor": 10.0},
    "scale_off_by_one_percent": {"scale": 1.01},
    "last_column_missing": {"last_column": False},
    "mean_shifted": {"mean_shift": 0.02},
    "bias_forgotten": {"keep_bias": False},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=DTYPE_NAMES.get)
def test_rule_rejects_wrong_variants(op, dtype, wrong):
    if wrong in ("mean_shifted", "bias_forgotten") and op.endswith("rms_norm"):
        pytest.skip("rms_norm has neither mean nor bias")
    data = "small" if wrong == "eps_times_ten" else "normal"
    case = cases.NormCase(op, (64, 40), (40,), dtype, data=data)
    inputs = cases.make_inputs(case)
    if data == "small" and case.adds:
        inputs.residual.mul_(1e-4)
    right = _wrong(case, inputs)
    assert failures(judge_results(cases, case, inputs, right)) == []
    assert failures(judge_results(cases, case, inputs, _wrong(case, inputs, **WRONG[wrong]))) != []


# Autograd in all its forms.


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("affine", (True, False), ids=("affine", "plain"))
def test_gradcheck_and_gradgradcheck(op, affine, backend, device):
    case = cases.NormCase(op, (3, 5), (5,), torch.float64, weight=affine, bias=affine)
    inputs = cases.make_inputs(case, device)
    names = [name for name in ("x", "residual", "weight", "bias") if getattr(inputs, name) is not None]
    tensors = [getattr(inputs, name).requires_grad_() for name in names]

    def function(*tensors):
        return cases.call(case, dataclasses.replace(inputs, **dict(zip(names, tensors, strict=True))), backend)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("op", cases.OPS)
def test_only_what_is_needed_gets_a_gradient(op, backend, device, poison):
    case = cases.NormCase(op, (4, 24), (24,))
    inputs = cases.make_inputs(case, device)
    whole = cases.evaluate(case, inputs, backend)
    for name in [name for name in ("x", "residual", "weight", "bias") if getattr(inputs, name) is not None]:
        leaf = getattr(inputs, name).clone().requires_grad_()
        y = cases.call(case, dataclasses.replace(inputs, **{name: leaf}), backend)
        grads = (inputs.dy, inputs.dresidual)
        live = [(out, grad) for out, grad in zip(y, grads, strict=False) if out.requires_grad]
        (grad,) = torch.autograd.grad([out for out, _ in live], leaf, [grad for _, grad in live])
        assert torch.equal(grad, whole[f"d{name}"])


@pytest.mark.parametrize("op", ("add_layer_norm", "add_rms_norm"))
@pytest.mark.parametrize("used", (0, 1))
def test_one_of_two_outputs_used(op, used, backend, device, poison):
    case = cases.NormCase(op, (4, 24), (24,))
    inputs = cases.make_inputs(case, device)
    inputs.x.requires_grad_()
    (actual,) = torch.autograd.grad(cases.call(case, inputs, backend)[used], inputs.x, inputs.dy)
    (expected,) = torch.autograd.grad(cases.call_torch(case, inputs)[used], inputs.x, inputs.dy)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ("layer_norm", "rms_norm"))
def test_functorch(op):
    case = cases.NormCase(op, (6, 24), (24,))
    inputs = cases.make_inputs(case)

    def ours(x, weight):
        return cases.call(case, dataclasses.replace(inputs, x=x, weight=weight))[0]

    def theirs(x, weight):
        return cases.call_torch(case, dataclasses.replace(inputs, x=x, weight=weight))[0]

    x, weight = inputs.x, inputs.weight
    tangents = (torch.randn_like(x), torch.randn_like(weight))
    transforms = {
        "grad": lambda f: torch.func.grad(lambda x, w: f(x, w).cos().sum(), (0, 1))(x, weight),
        "vmap": lambda f: torch.func.vmap(f, (0, None))(x, weight),
        "vmap of weights": lambda f: torch.func.vmap(f, (None, 0))(x, weight + torch.randn(3, 24, generator=_seed())),
        "jvp": lambda f: torch.func.jvp(f, (x, weight), tangents),
        "per-sample grad": lambda f: torch.func.vmap(
            torch.func.grad(lambda w, x: f(x, w).cos().sum()), (None, 0)
        )(weight, x),
        "hessian": lambda f: torch.func.hessian(lambda w: f(x[:1], w).cos().sum())(weight),
    }
    for name, transform in transforms.items():
        torch.testing.assert_close(transform(ours), transform(theirs), rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


def _seed():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("op", ("layer_norm", "rms_norm"))
def test_forward_ad_tangent_is_never_zero(op):
    case = cases.NormCase(op, (2, 8), (8,))
    inputs = cases.make_inputs(case)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs.x, torch.randn(2, 8, generator=_seed()))
        y = cases.call(case, dataclasses.replace(inputs, x=dual))[0]
        expected = cases.call_torch(case, dataclasses.replace(inputs, x=dual))[0]
        tangents = [torch.autograd.forward_ad.unpack_dual(t).tangent for t in (y, expected)]
    torch.testing.assert_close(*tangents)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the cpu backend is not the one that is forced")
def test_forced_kernel_under_a_transform_raises_why():
    if llmkernels.backends()["cpu"] is not None:
        pytest.skip("cpu: " + llmkernels.backends()["cpu"])
    with pytest.raises(llmkernels.NoBackendError, match="needs plain PyTorch"):
        torch.func.vmap(lambda x: llmkernels.functional.layer_norm(x, (8,), backend="cpu"))(torch.randn(2, 8))


def test_reference_is_a_plain_function():
    assert reference.layer_norm_fwd.__module__ == "llmkernels.ops.norm.reference"
