"""What is particular to swiglu, geglu and reglu; test_battery.py has the rest."""

import pytest
import torch
import torch.nn.functional as torch_functional

from llmkernels import functional
from llmkernels.ops.gated import cases, reference
from llmkernels.ops.gated.op import OP_OF
from llmkernels.testing.battery import failures, judge_results
from llmkernels.testing.inputs import outputs_and_gradients, short_name

ACTIVATIONS = tuple(OP_OF)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def call(activation, gate, up=None, backend=None):
    settings = {"approximate": "tanh"} if activation == "gelu_tanh" else {}
    return getattr(functional, OP_OF[activation])(gate, up, **settings, backend=backend)


def formula(activation, gate, up=None):
    """torch's own functions."""
    gate, up = reference.factors(gate, up)
    return reference.ACTIVATIONS[activation](gate) * up


# Deliberately wrong formulas: the rule has to reject each of them.

WRONG = {
    "sigmoid without x": ("swiglu", lambda gate, up: torch.sigmoid(gate) * up),
    "silu for exact gelu": ("geglu", lambda gate, up: torch_functional.silu(gate) * up),
    "sigmoid of 1.702 x for gelu": ("geglu", lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up),
    "tanh form for exact gelu": ("geglu", lambda gate, up: torch_functional.gelu(gate, approximate="tanh") * up),
    "halves swapped": ("swiglu", lambda gate, up: gate * torch_functional.silu(up)),
    "up activated too": ("reglu", lambda gate, up: torch.relu(gate) * torch.relu(up)),
    "leaky relu": ("reglu", lambda gate, up: torch_functional.leaky_relu(gate) * up),
    "one percent off": ("swiglu", lambda gate, up: torch_functional.silu(gate) * up * 1.01),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=short_name)
def test_rule_rejects_wrong_variants(dtype, wrong):
    op, variant = WRONG[wrong]
    case = cases.GatedCase(op, (64, 40), dtype)
    inputs = cases.make_inputs(case)
    results = outputs_and_gradients(inputs, lambda leaves: (variant(leaves.gate, leaves.up),))
    assert failures(judge_results(cases, case, inputs, results)) != []


@pytest.mark.parametrize("wrong", [name for name in WRONG if name != "tanh form for exact gelu"])
def test_rule_rejects_wrong_variants_in_bf16(wrong):
    """The tanh form is within 5e-4 of the exact one: bf16 has no digits for that."""
    op, variant = WRONG[wrong]
    case = cases.GatedCase(op, (64, 40), torch.bfloat16)
    inputs = cases.make_inputs(case)
    wide = lambda leaves: (variant(leaves.gate.float(), leaves.up.float()).bfloat16(),)
    assert failures(judge_results(cases, case, inputs, outputs_and_gradients(inputs, wide))) != []


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
@pytest.mark.parametrize("op", cases.OPS)
def test_rule_rejects_wrong_gradients(op, dtype):
    case = cases.GatedCase(op, (64, 40), dtype)
    inputs = cases.make_inputs(case)
    right = outputs_and_gradients(inputs, lambda leaves: cases.call(case, leaves, "torch"))
    assert failures(judge_results(cases, case, inputs, right)) == []
    gate, up, dy = (tensor.float() for tensor in (inputs.gate, inputs.up, inputs.dy))
    _, slope = reference.activated(gate, case.activation)
    slope = (gate > 0).float() if slope is None else slope
    value = reference.ACTIVATIONS[case.activation](gate)
    wrong = {
        "up forgotten in dgate": {"dgate": dy * slope},
        "dy forgotten in dup": {"dup": value},
        "value for slope in dgate": {"dgate": dy * up * value},
        "gradients swapped": {"dgate": right["dup"], "dup": right["dgate"]},
    }
    for name, results in wrong.items():
        results = right | {key: value.to(dtype) for key, value in results.items()}
        assert failures(judge_results(cases, case, inputs, results)) != [], name


# Accuracy of the functions underneath, on every instruction set.


def _truth(activation, x):
    """act(x) in fp64 without cancellation."""
    x = x.double()
    if activation == "silu":
        return x / (1.0 + torch.exp(-x))
    if activation == "gelu":
        return x * 0.5 * torch.special.erfc(-x * 0.5**0.5)
    if activation == "gelu_tanh":
        return x / (1.0 + torch.exp(-(1.5957691216057308 * (x + 0.044715 * x**3))))
    return torch.relu(x)


# Below -88.7 exp(-x) overflows in fp32, and silu, then smaller than this, becomes zero as torch's does.
NOTHING = 1e-36


@every_activation
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=short_name)
def test_all_16_bit_inputs(dtype, activation, isa):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    y, expected = call(activation, x, torch.ones_like(x), "cpu"), _truth(activation, x)
    assert torch.equal(torch.isnan(y), torch.isnan(expected))
    assert torch.equal(torch.isinf(y), torch.isinf(expected.to(dtype)))
    finite = torch.isfinite(y)
    # Half an ulp of rounding and a little of fp32's; below the normal numbers an ulp is a constant.
    ulp = torch.finfo(dtype).eps * expected.abs().clamp(min=torch.finfo(dtype).tiny)
    assert ((y.double() - expected).abs() <= 0.51 * ulp + NOTHING)[finite].all()


@every_activation
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=short_name)
def test_dense_sweep(dtype, activation, isa):
    x = torch.cat(
        (torch.linspace(-110, 110, 1_000_003), torch.logspace(-44, 38, 20_001), -torch.logspace(-44, 38, 20_001))
    )
    x = x.to(dtype) if dtype == torch.float32 else x[::10].to(dtype)
    y, expected = call(activation, x, torch.ones_like(x), "cpu").double(), _truth(activation, x)
    assert torch.isfinite(y).all()
    # Below zero a result is about exp(-argument), to which the rounding of its argument does this much.
    size = x.double().abs()
    argument = {"gelu": size**2 / 2, "gelu_tanh": 1.6 * size + 0.072 * size**3}.get(activation, torch.zeros_like(size))
    ulps = 4.0 + torch.where(x < 0, 2.0 * argument.clamp(max=1000.0), 0.0)
    error = (y - expected).abs() - NOTHING
    worst = (error / (ulps * torch.finfo(dtype).eps * expected.abs().clamp(min=torch.finfo(dtype).tiny))).max()
    assert worst <= (0.0 if activation == "relu" else 1.0)
