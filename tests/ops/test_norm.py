"""What is particular to layer_norm, rms_norm and their residual adds; test_battery.py has the rest."""

import pytest
import torch

from llmkernels.ops.norm import cases, reference
from llmkernels.testing.battery import failures, judge_results
from llmkernels.testing.inputs import outputs_and_gradients, short_name

# Deliberately wrong formulas: the rule has to reject each of them.


def _wrong(case, inputs, *, bessel=False, eps_factor=1.0, scale=1.0, last_column=True, mean_shift=0.0, keep_bias=True):
    def formula(leaves):
        x = cases.summed(case, leaves)
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

    return outputs_and_gradients(inputs, formula)


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
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
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


@pytest.mark.parametrize("op", ("layer_norm", "rms_norm"))
def test_functorch(op):
    case = cases.NormCase(op, (6, 24), (24,))
    inputs = cases.make_inputs(case)

    def ours(x, weight):
        return cases.call(case, inputs.replace(x=x, weight=weight))[0]

    def theirs(x, weight):
        return cases.call_torch(case, inputs.replace(x=x, weight=weight))[0]

    x, weight = inputs.x, inputs.weight
    tangents = (torch.randn_like(x), torch.randn_like(weight))
    transforms = {
        "grad": lambda f: torch.func.grad(lambda x, w: f(x, w).cos().sum(), (0, 1))(x, weight),
        "vmap": lambda f: torch.func.vmap(f, (0, None))(x, weight),
        "vmap of weights": lambda f: torch.func.vmap(f, (None, 0))(x, weight + torch.randn(3, 24, generator=_seed())),
        "jvp": lambda f: torch.func.jvp(f, (x, weight), tangents),
        "per-sample grad": lambda f: torch.func.vmap(torch.func.grad(lambda w, x: f(x, w).cos().sum()), (None, 0))(
            weight, x
        ),
        "hessian": lambda f: torch.func.hessian(lambda w: f(x[:1], w).cos().sum())(weight),
    }
    for name, transform in transforms.items():
        torch.testing.assert_close(
            transform(ours), transform(theirs), rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def _seed():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("op", ("layer_norm", "rms_norm"))
def test_forward_ad_tangent_is_never_zero(op):
    case = cases.NormCase(op, (2, 8), (8,))
    inputs = cases.make_inputs(case)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs.x, torch.randn(2, 8, generator=_seed()))
        y = cases.call(case, inputs.replace(x=dual))[0]
        expected = cases.call_torch(case, inputs.replace(x=dual))[0]
        tangents = [torch.autograd.forward_ad.unpack_dual(t).tangent for t in (y, expected)]
    torch.testing.assert_close(*tangents)


def test_reference_is_a_plain_function():
    assert reference.layer_norm_fwd.__module__ == "llmkernels.ops.norm.reference"
