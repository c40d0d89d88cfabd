"""nf4: what the bits are, the nearest level, scales that are quantized too, what is refused."""

from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies

from llmkernels.quantization import nf4

LEVELS = torch.tensor(nf4.LEVELS, dtype=torch.float64)
SETTINGS = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


def random_weight(n=6, k=200, dtype=torch.float64, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scales_of(found):
    """The scale of each column, `[N, K]` fp64, read as the file says, one at a time."""
    n, groups = found.scales.shape
    scales = found.scales.double()
    if found.second_scales is not None:
        mean, steps = float(found.second_scales[0]), found.second_scales[1:].double()
        rows = [[mean + steps[(r * groups + g) // 256] * scales[r, g] for g in range(groups)] for r in range(n)]
        scales = torch.tensor(rows, dtype=torch.float64)
    return scales.repeat_interleave(found.group_size or found.shape[1], 1)[:, : found.shape[1]]


def test_the_bits():
    codes = torch.tensor([[15, 0, 7, 8, 3], [7, 7, 1, 15, 2]])
    scale = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    found = nf4.quantize(LEVELS[codes] * scale, group_size=32)
    assert found.scales.dtype == torch.bfloat16 and found.scales.tolist() == [[0.5], [2.0]]
    assert found.data.tolist() == [[0x0F, 0x87, 0x03], [0x77, 0xF1, 0x02]] and found.data.dtype == torch.uint8
    assert torch.equal(nf4.unpack(found.data, 5).long(), codes)
    torch.testing.assert_close(found.dequantize(), LEVELS[codes] * scale, rtol=1e-7, atol=0)


@pytest.mark.parametrize("double", (False, True))
@pytest.mark.parametrize("group_size", nf4.GROUP_SIZES)
def test_every_weight_has_the_nearest_level(group_size, double):
    weight = random_weight(40, 300)
    found = nf4.quantize(weight, group_size=group_size, double=double)
    scales = scales_of(found)
    best = ((weight / scales)[..., None] - LEVELS).abs().amin(2)
    error = (found.dequantize() - weight).abs() / scales
    torch.testing.assert_close(error, best, rtol=1e-6, atol=1e-6)
    inside = (weight / scales).abs() <= 1.0
    gap = float((LEVELS[1:] - LEVELS[:-1]).max()) / 2
    # The largest of a group is outside where its scale was rounded down.
    assert (error[inside] <= gap + 1e-6).all() and inside.float().mean() > 0.97
    relative = (found.dequantize() - weight).norm() / weight.norm()
    assert 0.07 < relative < 0.13


def test_scales_that_are_quantized_too():
    weight = random_weight(30, 1100, seed=1) * (1.0 + torch.rand(30, 1, dtype=torch.float64))
    found, plain = nf4.quantize(weight, group_size=32, double=True), nf4.quantize(weight, group_size=32)
    largest = torch.nn.functional.pad(weight.abs(), (0, 20)).unflatten(1, (35, 32)).amax(2)
    assert found.scales.dtype == torch.int8 and found.scales.shape == (30, 35)
    assert found.second_scales.shape == (1 + -(-30 * 35 // 256),) and found.second_scales.dtype == torch.float32
    assert float(found.second_scales[0]) == pytest.approx(float(largest.mean()), rel=1e-6)
    read = nf4.read_scales(found.scales, found.second_scales, torch.float64)
    steps = found.second_scales[1:].double().repeat_interleave(256)[: 30 * 35].view(30, 35)
    assert ((read - largest).abs() <= 0.5001 * steps).all()
    assert found.bits_per_weight == pytest.approx((30 * 550 + 30 * 35 + 4 * 6) * 8 / (30 * 1100))
    assert found.bits_per_weight < plain.bits_per_weight
    error, plain_error = ((w.dequantize() - weight).norm() for w in (found, plain))
    assert error < 1.01 * plain_error
    exact = torch.full((2, 64), 3.0)  # all scales alike: their spread is zero
    assert torch.equal(nf4.quantize(exact, double=True).dequantize(), exact)


@SETTINGS
@hypothesis.given(
    n=strategies.integers(1, 4), k=strategies.integers(1, 150), group_size=strategies.sampled_from(nf4.GROUP_SIZES),
    exponent=strategies.integers(-30, 30), seed=strategies.integers(0, 999),
)  # fmt: skip
def test_what_was_rounded_once_is_rounded_to_itself(n, k, group_size, exponent, seed):
    once = nf4.quantize(random_weight(n, k, seed=seed) * 2.0**exponent, group_size=group_size).dequantize()
    assert torch.equal(nf4.quantize(once, group_size=group_size).dequantize(), once)


@pytest.mark.parametrize("columns", (1, 2, 31, 33, 64, 65, 127, 129))
def test_ragged_groups_and_odd_columns(columns):
    weight = random_weight(4, columns)
    found = nf4.quantize(weight, group_size=32)
    tail = columns - (columns - 1) // 32 * 32
    alone = nf4.quantize(weight[:, -tail:], group_size=32)
    assert torch.equal(found.scales[:, -1:], alone.scales)
    assert torch.equal(found.dequantize()[:, -tail:], alone.dequantize())
    if columns % 2:
        assert not (found.data[:, -1] >> 4).any()


@pytest.mark.parametrize("double", (False, True))
def test_groups_of_zeros_tiny_and_huge_values(double):
    weight = random_weight(4, 64)
    weight[0], weight[1, :32] = 0.0, 0.0
    if not double:  # whose scales share a step
        weight[2] *= 1e-300
        weight[3] *= 1e37
    found = nf4.quantize(weight, group_size=32, double=double)
    wide = found.dequantize(torch.float64)
    assert wide.isfinite().all() and not wide[0].any() and not wide[1, :32].any()
    assert (nf4.unpack(found.data, 64)[0] == 7).all()
    assert (wide[3] - weight[3]).norm() / weight[3].norm() < 0.12
    if not double:
        assert not wide[2].any() and (found.scales[0] == 1.0).all()
    for empty in (torch.zeros(3, 0), torch.zeros(0, 5)):
        assert nf4.quantize(empty, double=double).dequantize().shape == empty.shape


def test_bad_input_has_one_clear_message():
    w, double, nan = nf4.quantize(random_weight()), nf4.quantize(random_weight(), double=True), random_weight()
    nan[3, 5] = float("inf")
    wrong = [
        (ValueError, "nf4: row 3 of w has a NaN or an infinity", lambda: nf4.quantize(nan, "w")),
        (TypeError, "nf4: weight has dtype torch.int64", lambda: nf4.quantize(torch.ones(2, 3).long())),
        (ValueError, r"nf4: weight has shape \(3,\), expected \[N, K\]", lambda: nf4.quantize(torch.ones(3))),
        (ValueError, "nf4: group_size is 256, expected one of 32, 64, 128, None",
         lambda: nf4.quantize(nan, group_size=256)),
        (ValueError, "nf4: scale_dtype is torch.float64", lambda: nf4.quantize(nan, scale_dtype=torch.float64)),
        (ValueError, "nf4: scale_dtype is torch.float16 with double=True, expected it left out",
         lambda: nf4.quantize(nan, scale_dtype=torch.float16, double=True)),
        (TypeError, "nf4: activations='int8' is given, but", lambda: nf4.quantize(nan, activations="int8")),
        (TypeError, "nf4: symmetric=True is given, but", lambda: nf4.quantize(nan, symmetric=True)),
        (ValueError, r"nf4: data: torch.uint8 \(6, 100\), expected torch.uint8 \(7, 100\)",
         lambda: replace(w, shape=(7, 200))),
        (ValueError, "data's scales: torch.bfloat16", lambda: replace(w, group_size=32)),
        (ValueError, "data's scales: torch.bfloat16 .* expected torch.int8",
         lambda: replace(w, second_scales=double.second_scales)),
        (ValueError, r"data's second_scales: torch.float32 \(1,\), expected torch.float32 \(2,\)",
         lambda: replace(double, second_scales=double.second_scales[:1])),
        (ValueError, "nf4: zeros is given, expected None", lambda: replace(w, zeros=w.scales)),
        (ValueError, "nf4: up's scales have a value that is not finite and above zero",
         lambda: nf4.check_values(replace(w, scales=w.scales * 0.0), "up")),
        (ValueError, "nf4: data's second_scales have a value that is not finite",
         lambda: nf4.check_values(replace(double, second_scales=double.second_scales / 0.0))),
    ]  # fmt: skip
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
    nf4.check_values(w)
    nf4.check_values(double)
