"""int4: what the bits are, which scales are chosen, what is refused."""

from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies

from llmkernels.quantization import int4
from llmkernels.quantization.tensor import quantize_tensor

SETTINGS = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
OPTIONS = [
    {"group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
    for group_size in int4.GROUP_SIZES
    for symmetric in (True, False)
    for scale_dtype in (torch.bfloat16, torch.float16, torch.float32)
]


def random_weight(n=6, k=200, dtype=torch.float64, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def steps_of(found):
    """The step of each column, `[N, K]` fp64."""
    size = found.group_size or found.shape[1]
    return found.scales.double().repeat_interleave(size, 1)[:, : found.shape[1]]


def test_the_bits_of_symmetric_weights():
    codes = torch.tensor([[15, 1, 8, 9, 7], [0, 8, 15, 8, 10]])
    found = int4.quantize((codes - 8) * torch.tensor([[0.5], [2.0]]), group_size=32)
    assert found.scales.dtype == torch.bfloat16 and found.scales.tolist() == [[0.5], [2.0]] and found.zeros is None
    # Columns 0 and 1 are the first byte, the even one in the low half; the last half byte is zero.
    assert found.data.tolist() == [[0x1F, 0x98, 0x07], [0x80, 0x8F, 0x0A]] and found.data.dtype == torch.uint8
    assert torch.equal(int4.unpack(found.data, 5).long(), codes)


def test_the_bits_of_asymmetric_weights():
    codes, zeros = torch.tensor([[0, 15, 3, 4], [15, 2, 0, 9]]), torch.tensor([[3], [15]])
    found = int4.quantize((codes - zeros) * torch.tensor([[0.25], [4.0]]), group_size=None, symmetric=False)
    assert found.scales.tolist() == [[0.25], [4.0]] and found.zeros.tolist() == [[3], [15]]
    assert found.data.tolist() == [[0xF0, 0x43], [0x2F, 0x90]] and found.zeros.dtype == torch.uint8
    # All above zero, or all below: zero stays among what can be written.
    above = int4.quantize(torch.tensor([[1.5, 0.5, 0.75, 1.0]]) * 10, group_size=None, symmetric=False)
    below = int4.quantize(torch.tensor([[1.5, 0.5, 0.75, 1.0]]) * -10, group_size=None, symmetric=False)
    assert above.zeros.tolist() == [[0]] and above.data.tolist() == [[0x5F, 0xA8]]
    assert below.zeros.tolist() == [[15]] and below.data.tolist() == [[0xA0, 0x57]]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v).split(".")[-1] for v in o.values()))
def test_every_weight_is_within_half_a_step_or_clipped(options):
    weight = random_weight() * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None] + 0.001
    found = int4.quantize(weight, **options)
    step, error = steps_of(found), (found.dequantize(torch.float64) - weight).abs()
    codes = int4.unpack(found.data, 200)
    clipped = (codes == 0) | (codes == 15)
    # A bf16 scale that was rounded down, or a zero point that was, moves the ends by up to half a step too.
    assert (error[~clipped] <= 0.5001 * step[~clipped]).all()
    assert clipped.float().mean() < 0.12 and (error < 4.0 * step).all()
    assert found.scales.dtype == options["scale_dtype"] and (found.zeros is None) == options["symmetric"]
    groups = -(-200 // (options["group_size"] or 200))
    assert found.scales.shape == (6, groups)
    bits = 4 + groups / 200 * (8 * options["scale_dtype"].itemsize + (0 if options["symmetric"] else 8))
    assert found.bits_per_weight == pytest.approx(bits)


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("group_size", int4.GROUP_SIZES)
def test_the_scale_of_a_group_is_the_best_of_those_tried(group_size, symmetric):
    """Group by group, beside each count of steps alone, one weight at a time."""
    weight = random_weight(3, 140, seed=1)
    found = int4.quantize(weight, group_size=group_size, symmetric=symmetric, scale_dtype=torch.float32)
    size = group_size or 140
    error = (found.dequantize(torch.float64) - weight).square()
    better = total = 0.0
    for row in range(3):
        for first in range(0, 140, size):
            group = weight[row, first : first + size]
            low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
            errors = []
            for steps in int4.SYMMETRIC_STEPS if symmetric else int4.ASYMMETRIC_STEPS:
                scale = (max(-low, high) if symmetric else high - low) / steps
                zero = 8 if symmetric else min(max(round(-low / scale - (steps - 15) / 2), 0), 15)
                codes = [min(max(round(float(w) / scale) + zero, 0), 15) for w in group]
                errors.append(sum((scale * (q - zero) - float(w)) ** 2 for q, w in zip(codes, group, strict=True)))
            assert float(error[row, first : first + size].sum()) == pytest.approx(min(errors), rel=1e-4)
            better, total = better + errors[0] - min(errors), total + errors[0]
    assert better / total > (0.1 if symmetric else 0.03)


@pytest.mark.parametrize("group_size, most", ((32, 0.088), (64, 0.0965), (128, 0.1025), (None, 0.111)))
def test_the_error_of_normal_weights(group_size, most):
    """0.0970, 0.1076, 0.1173 and 0.1501 with the largest weight at 7 steps."""
    weight = random_weight(128, 2048, seed=2)
    error = (int4.quantize(weight, group_size=group_size).dequantize() - weight).norm() / weight.norm()
    assert 0.9 * most < error < most
    finer = int4.quantize(weight, group_size=group_size, symmetric=False).dequantize()
    assert (finer - weight).norm() / weight.norm() < error


@pytest.mark.parametrize("symmetric", (True, False))
def test_columns_that_count_more_have_less_error(symmetric):
    weight, importance = random_weight(64, 256, seed=4), torch.ones(256)
    importance[::40] = 1000.0
    plain, weighted = (int4.quantize(weight, symmetric=symmetric, importance=i) for i in (None, importance))
    errors = [((w.dequantize() - weight).square() * importance).sum() for w in (plain, weighted)]
    assert errors[1] < 0.6 * errors[0]
    alike = int4.quantize(weight, symmetric=symmetric, importance=torch.full((256,), 7.0))
    assert torch.equal(alike.data, plain.data) and torch.equal(alike.scales, plain.scales)
    assert int4.quantize(weight, importance=torch.zeros(256)).dequantize().isfinite().all()


@SETTINGS
@hypothesis.given(strategies.data())
def test_pack_and_unpack_are_inverse(data):
    n, k = data.draw(strategies.integers(0, 5)), data.draw(strategies.integers(0, 70))
    codes = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(data.draw(strategies.integers(0, 99))))
    packed = int4.pack(codes)
    assert packed.shape == (n, (k + 1) // 2) and packed.dtype == torch.uint8
    assert torch.equal(int4.unpack(packed, k).long(), codes)
    assert torch.equal(int4.pack(int4.unpack(packed, k)), packed)


@SETTINGS
@hypothesis.given(
    n=strategies.integers(1, 4), k=strategies.integers(1, 150), group_size=strategies.sampled_from(int4.GROUP_SIZES),
    exponent=strategies.integers(-30, 30), seed=strategies.integers(0, 999),
)  # fmt: skip
def test_what_was_rounded_once_is_rounded_to_itself(n, k, group_size, exponent, seed):
    weight = random_weight(n, k, seed=seed) * 2.0**exponent
    weight[weight.abs() < 0.1 * 2.0**exponent] = 0.0
    once = int4.quantize(weight, group_size=group_size).dequantize()
    assert torch.equal(int4.quantize(once, group_size=group_size).dequantize(), once)


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("columns", (1, 2, 31, 33, 64, 65, 127, 129))
def test_ragged_groups_and_odd_columns(columns, symmetric):
    """A last group that is shorter has the scale of its own columns."""
    weight = random_weight(4, columns)
    found = int4.quantize(weight, group_size=32, symmetric=symmetric)
    tail = columns - (columns - 1) // 32 * 32
    alone = int4.quantize(weight[:, -tail:], group_size=32, symmetric=symmetric)
    assert torch.equal(found.scales[:, -1:], alone.scales)
    assert torch.equal(found.dequantize()[:, -tail:], alone.dequantize())
    if columns % 2:
        assert not (found.data[:, -1] >> 4).any()


@pytest.mark.parametrize("symmetric", (True, False))
def test_groups_of_zeros_tiny_and_huge_values(symmetric):
    weight = random_weight(5, 64)
    weight[0], weight[1, :32], weight[2] = 0.0, 0.0, weight[2] * 1e-300
    weight[3] *= 1e37
    weight[4] *= 1e-30
    found = int4.quantize(weight, group_size=32, symmetric=symmetric)
    assert (found.scales > 0).all() and found.scales.isfinite().all()
    assert (found.scales[0] == 1.0).all() and found.scales[1, 0] == 1.0
    wide = found.dequantize(torch.float64)
    assert not wide[0].any() and not wide[1, :32].any() and not wide[2].any()
    for row in (3, 4):
        error = (wide[row] - weight[row]).norm() / weight[row].norm()
        assert error < 0.11
    assert int4.quantize(torch.zeros(3, 0), symmetric=symmetric).dequantize().shape == (3, 0)
    assert int4.quantize(torch.zeros(0, 5), symmetric=symmetric).dequantize().shape == (0, 5)


@pytest.mark.parametrize("symmetric", (True, False))
def test_blocks_of_rows_do_not_show(symmetric, monkeypatch):
    weight, importance = random_weight(23, 70, seed=5), torch.rand(70)
    whole = int4.quantize(weight, group_size=32, symmetric=symmetric, importance=importance)
    monkeypatch.setattr(int4, "BLOCK", 3 * 70)
    found = int4.quantize(weight, group_size=32, symmetric=symmetric, importance=importance)
    assert found.parts.keys() == whole.parts.keys()
    assert all(torch.equal(part, whole.parts[name]) for name, part in found.parts.items())
    weight[19, 3] = float("inf")
    with pytest.raises(ValueError, match="row 19 of weight has a NaN or an infinity"):
        int4.quantize(weight, symmetric=symmetric)
    weight[19, 3] = 1e6
    with pytest.raises(ValueError, match="row 19 of weight reaches 1.0e[+]06"):
        int4.quantize(weight, symmetric=symmetric, scale_dtype=torch.float16)


def test_dequantize_is_the_definition():
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (3, 70), generator=generator)
    zeros = torch.randint(0, 17, (3, 3), generator=generator, dtype=torch.uint8)
    scales = torch.rand(3, 3, generator=generator) + 0.1
    made = int4.quantize(random_weight(3, 70), group_size=32, symmetric=False, scale_dtype=torch.float32)
    made = replace(made, data=int4.pack(codes), scales=scales, zeros=zeros)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = made.dequantize(dtype)
        for n, k in ((0, 0), (1, 31), (1, 32), (2, 69)):
            exact = scales[n, k // 32].double() * (int(codes[n, k]) - int(zeros[n, k // 32]))
            torch.testing.assert_close(found[n, k], exact.to(dtype))
    int4.check_values(made)  # a zero point of 16 is one that a checkpoint may have


def test_bad_input_has_one_clear_message():
    w, asymmetric = int4.quantize(random_weight()), int4.quantize(random_weight(), symmetric=False)
    nan = random_weight()
    nan[3, 5] = float("nan")
    zeros = lambda value: replace(asymmetric, zeros=torch.full_like(asymmetric.zeros, value))
    wrong = [
        (ValueError, "int4: row 3 of w has a NaN or an infinity", lambda: int4.quantize(nan, "w")),
        (ValueError, r"row 0 of weight reaches 1.0e\+06, expected less: scales are float16",
         lambda: int4.quantize(torch.full((1, 4), 1e6), scale_dtype=torch.float16)),
        (TypeError, "int4: weight has dtype torch.int64", lambda: int4.quantize(torch.ones(2, 3).long())),
        (ValueError, r"int4: weight has shape \(3,\), expected \[N, K\]", lambda: int4.quantize(torch.ones(3))),
        (ValueError, r"int4: group_size is 48, expected one of 32, 64, 128, None \(the whole row\)",
         lambda: int4.quantize(nan, group_size=48)),
        (ValueError, "int4: scale_dtype is torch.float64, expected one of torch.float32, torch.bfloat16",
         lambda: int4.quantize(nan, scale_dtype=torch.float64)),
        (ValueError, r"int4: importance has shape \(3,\), expected \(200,\), finite and not below zero",
         lambda: int4.quantize(random_weight(), importance=torch.ones(3))),
        (ValueError, r"int4: importance has shape \(200,\), expected",
         lambda: int4.quantize(random_weight(), importance=-torch.ones(200))),
        (TypeError, "int4: double=True is given, but the format has no such", lambda: int4.quantize(nan, double=True)),
        (ValueError, "int4: activations is 'fp8', expected None or 'int8'",
         lambda: int4.quantize(random_weight(), activations="fp8")),
        (ValueError, "pack_nibbles: codes are 0 to 16, expected 0 to 15", lambda: int4.pack(torch.tensor([[0, 16]]))),
        (ValueError, r"int4: data: torch.uint8 \(6, 100\), expected torch.uint8 \(6, 101\)",
         lambda: replace(w, shape=(6, 201))),
        (ValueError, r"data's scales: torch.bfloat16 \(6, 4\), expected .* \(6, 7\)",
         lambda: replace(w, group_size=32)),
        (ValueError, "data's scales: torch.float64", lambda: replace(w, scales=w.scales.double())),
        (ValueError, "data's zeros: torch.int32", lambda: replace(asymmetric, zeros=asymmetric.zeros.int())),
        (ValueError, "int4: second_scales is given, expected None", lambda: replace(w, second_scales=w.scales)),
        (ValueError, r"int4: shape is \(1, 1048577\), expected \[N, K\] with K up to 1048576",
         lambda: int4.quantize(torch.ones(1, 2**20 + 1))),
        (ValueError, "int4: up.weight's zeros have a 17, expected 0 to 16",
         lambda: int4.check_values(zeros(17), "up.weight")),
        (ValueError, "int4: data's scales have a value that is not finite and above zero",
         lambda: int4.check_values(replace(w, scales=-w.scales))),
        (ValueError, "scales have a value that is not finite",
         lambda: int4.check_values(replace(w, scales=w.scales * float("nan")))),
    ]  # fmt: skip
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
    int4.check_values(w)
    assert (
        repr(quantize_tensor(random_weight(), "w4a8"))
        == "QuantizedTensor(w4a8, [6, 200], groups of 64, 4.32 bits per weight)"
    )
