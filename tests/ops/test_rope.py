"""What is particular to rope; test_battery.py has the rest."""

import pytest
import torch

from llmkernels import functional
from llmkernels.ops.rope import cases, reference
from llmkernels.ops.rope.cases import RopeCase
from llmkernels.testing.battery import evaluate, failures, judge, judge_results
from llmkernels.testing.inputs import outputs_and_gradients, short_name

# Deliberately wrong formulas: the rule has to reject each of them.

WRONG = {
    "sine of the other sign": lambda x, cos, sin: reference.rotate(x, cos, -sin),
    "cos and sin swapped": lambda x, cos, sin: reference.rotate(x, sin, cos),
    "interleaved for half-rotated": lambda x, cos, sin: reference.rotate(x, cos, sin, True),
    "second half of a pair turned the wrong way": lambda x, cos, sin: torch.cat(
        (reference.rotate(x, cos, sin).chunk(2, -1)[0], reference.rotate(x, cos, -sin).chunk(2, -1)[1]), -1
    ),
    "a position late": lambda x, cos, sin: reference.rotate(x, cos.roll(1, -2), sin.roll(1, -2)),
    "a pair late": lambda x, cos, sin: reference.rotate(x, cos.roll(1, -1), sin.roll(1, -1)),
    "half of the pairs kept": lambda x, cos, sin: reference.rotate(x, cos[..., :16], sin[..., :16]),
    "one percent off": lambda x, cos, sin: reference.rotate(x, cos, sin) * 1.01,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short_name)
def test_rule_rejects_wrong_variants(dtype, wrong):
    case = RopeCase("rope", (2, 3, 40, 64), dtype)
    inputs = cases.make_inputs(case)
    rows = inputs.cos[:40], inputs.sin[:40]
    right = outputs_and_gradients(
        inputs, lambda leaves: tuple(reference.rotate(x, *rows) for x in (leaves.q, leaves.k))
    )
    assert failures(judge_results(cases, case, inputs, right)) == []
    results = outputs_and_gradients(inputs, lambda leaves: tuple(WRONG[wrong](x, *rows) for x in (leaves.q, leaves.k)))
    assert failures(judge_results(cases, case, inputs, results)) != []


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short_name)
def test_rule_rejects_wrong_gradients(dtype):
    case = RopeCase("rope", (2, 3, 40, 64), dtype, positions="2d")
    inputs = cases.make_inputs(case)
    right = evaluate(cases, case, inputs, "torch")
    arguments = (inputs.cos, inputs.sin, inputs.positions, -2)
    forward = reference.rope_fwd(inputs.dq_turned, inputs.dk_turned, *arguments, False)
    interleaved = reference.rope_bwd(inputs.dq_turned, inputs.dk_turned, *arguments, True)
    wrong = {
        "turned on, not back": {"dq": forward[0], "dk": forward[1]},
        "not turned": {"dq": inputs.dq_turned},
        "the pairs of the other layout": {"dk": interleaved[1]},
    }
    assert failures(judge_results(cases, case, inputs, right)) == []
    for name, results in wrong.items():
        assert failures(judge_results(cases, case, inputs, right | results)) != [], name


def _tensors(device, dim=24, rotary=16, length=9):
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, heads, 5, dim, generator=generator).to(device) for heads in (4, 2))
    angles = torch.rand(length, rotary // 2, generator=generator) * 6.0
    return q, k, angles.cos().to(device), angles.sin().to(device)


@pytest.mark.parametrize("interleaved", (False, True))
def test_all_ways_to_say_the_same(interleaved, backend, device, poison):
    q, k, cos, sin = _tensors(device)
    positions = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 0, 3, 8]], device=device)
    settings = {"interleaved": interleaved, "backend": backend}
    expected = functional.rope(q, k, cos, sin, positions, **settings)
    flat = lambda x: x.transpose(1, 2).flatten(0, 1)  # [B, H, S, D] -> [B * S, H, D]
    ways = {
        "rows taken already": functional.rope(q, k, cos[positions], sin[positions], **settings),
        "sequence first": [
            y.transpose(1, 2)
            for y in functional.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, positions, seq_dim=-3, **settings)
        ],
        "counted from the front": functional.rope(q, k, cos, sin, positions.int(), seq_dim=2, **settings),
        "one at a time": [functional.rope(x, None, cos, sin, positions, **settings)[0] for x in (q, k)],
        "in place": functional.rope(q.clone(), k.clone(), cos, sin, positions, inplace=True, **settings),
    }
    for name, result in ways.items():
        assert all(torch.equal(y, other) for y, other in zip(result, expected, strict=True)), name
    packed = functional.rope(flat(q), flat(k), cos, sin, positions.flatten(), seq_dim=-3, **settings)
    assert all(torch.equal(y, flat(other)) for y, other in zip(packed, expected, strict=True))
    assert functional.rope(q, None, cos, sin, positions, **settings)[1] is None


def test_what_is_not_turned_keeps_every_bit(backend, device, poison):
    """Also a NaN with a payload."""
    q, k, cos, sin = _tensors(device)
    q.view(torch.int32)[0, 0, 0, 20] = 0x7FA12345
    for inplace in (False, True):
        y, _ = functional.rope(q.clone(), k.clone(), cos, sin, inplace=inplace, backend=backend)
        assert torch.equal(y[..., 16:].view(torch.int32), q[..., 16:].view(torch.int32))


def test_nan_and_inf_stay_in_their_pairs(backend, device):
    q, k, cos, sin = _tensors(device)
    q[0, 1, 2, 3], q[1, 0, 4, 12] = float("nan"), float("inf")
    y, _ = functional.rope(q, k, cos, sin, backend=backend)
    special = torch.zeros_like(q, dtype=torch.bool)
    special[0, 1, 2, 3] = special[0, 1, 2, 11] = special[1, 0, 4, 12] = special[1, 0, 4, 4] = True
    assert torch.equal(~torch.isfinite(y), special)


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32), ids=str)
@pytest.mark.parametrize("wrong", (-1, 9, 2**31 - 1))
def test_positions_outside_of_the_table(wrong, dtype, backend, device):
    """On a CPU an error; where values are not looked at NaN, and no access outside of the table."""
    q, k, cos, sin = _tensors(device)
    positions = torch.tensor([0, 8, wrong, 3, 4], dtype=dtype, device=device)
    if backend in ("cpu", "torch") and device == "cpu":
        message = "positions has -1, expected 0" if wrong < 0 else f"positions has {wrong}, but cos and sin have 9 rows"
        for inplace in (False, True):
            with pytest.raises(ValueError, match=f"rope: {message}"):
                functional.rope(q, k, cos, sin, positions, inplace=inplace, backend=backend)
        return
    q.requires_grad_()
    y = functional.rope(q, k, cos, sin, positions, backend=backend)
    (dq,) = torch.autograd.grad(y[0].sum(), q)
    for result in (*y, dq):
        outside = torch.isnan(result)
        assert outside[..., 2, :16].all() and outside.sum() == outside[..., 2, :16].sum()


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short_name)
@pytest.mark.parametrize("shape, seq_dim", (((1, 8, 4224, 128), -2), ((4224, 8, 128), -3), ((2, 4, 4300, 130), -2)))
def test_results_too_large_for_a_cache(shape, seq_dim, dtype, interleaved):
    """On a CPU they are written past the caches, if whole vectors can be."""
    case = RopeCase("rope", shape, dtype, 1, interleaved=interleaved, seq_dim=seq_dim)
    inputs = cases.make_inputs(RopeCase("rope", shape, torch.float32, 1, seq_dim=seq_dim))
    tensors = [tensor.to(dtype) for tensor in (inputs.q, inputs.k, inputs.cos, inputs.sin)]
    settings = {"interleaved": interleaved, "seq_dim": case.seq_dim}
    ours = functional.rope(*tensors, **settings)
    theirs = functional.rope(*tensors, **settings, backend="torch")
    inplace = functional.rope(tensors[0].clone(), tensors[1].clone(), *tensors[2:], inplace=True, **settings)
    # Both compute in fp32 and round once; a product that is added without rounding makes the last digit another one.
    for y, other, third in zip(ours, theirs, inplace, strict=True):
        torch.testing.assert_close(y, other)
        assert torch.equal(y, third)


def test_heads_longer_than_what_is_staged(backend, device):
    for interleaved in (False, True):
        case = RopeCase("rope", (2, 3, 5000), torch.float32, rotary=4900, interleaved=interleaved)
        assert failures(judge(cases, case, backend, device)) == []
