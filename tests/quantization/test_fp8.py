"""fp8: what the bits are, rounding to the nearest, rows and blocks, what is refused."""

from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies

from llmkernels.quantization import fp8


def value_of(byte):
    """The number that eight bits mean, from the drawing."""
    sign, exponent, fraction = byte >> 7, byte >> 3 & 15, byte & 7
    size = 2.0**-6 * fraction / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + fraction / 8)
    return -size if sign else size


NUMBERS = torch.tensor([value_of(byte) for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.float64)


def random_weight(n=6, k=200, dtype=torch.float64, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_the_bits():
    bytes_ = torch.tensor([byte for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.uint8)
    assert torch.equal(bytes_.view(torch.float8_e4m3fn).double(), NUMBERS) and NUMBERS.max() == 448.0
    found = fp8.quantize(torch.stack((NUMBERS, NUMBERS * 0.5)))
    assert torch.equal(found.scales, torch.tensor([1.0, 0.5])) and found.data.dtype == torch.float8_e4m3fn
    assert torch.equal(found.data.view(torch.uint8), torch.stack((bytes_, bytes_)))
    assert torch.equal(found.dequantize(), torch.stack((NUMBERS, NUMBERS * 0.5)))
    few = fp8.quantize(torch.tensor([[448.0, -1.0, 0.0, 2.0**-9]]))
    assert few.data.view(torch.uint8).tolist() == [[0x7E, 0xB8, 0x00, 0x01]]


def test_rounding_is_to_nearest_and_ties_to_even():
    positive = NUMBERS[NUMBERS >= 0.0].sort().values.unique()
    middle = (positive[1:] + positive[:-1]) / 2
    even = torch.where(torch.arange(len(middle)) % 2 == 0, positive[:-1], positive[1:])
    assert torch.equal(fp8.round_to_fp8(middle).double(), even)
    assert torch.equal(fp8.round_to_fp8(-middle).double(), -even)
    assert torch.equal(fp8.round_to_fp8(middle * (1 + 1e-6)).double(), positive[1:])
    assert torch.equal(fp8.round_to_fp8(middle * (1 - 1e-6)).double(), positive[:-1])
    assert fp8.round_to_fp8(torch.tensor([1e9, -460.0])).double().tolist() == [448.0, -448.0]


@pytest.mark.parametrize("group_size", fp8.GROUP_SIZES)
@pytest.mark.parametrize("shape", ((6, 200), (130, 300), (1, 1), (128, 128), (129, 127)), ids=str)
def test_scales_and_half_steps(shape, group_size):
    weight = random_weight(*shape) * torch.logspace(-3, 3, shape[0], dtype=torch.float64)[:, None]
    found = fp8.quantize(weight, group_size=group_size)
    for n, k in {(0, 0), (shape[0] - 1, 0), (0, shape[1] - 1), (shape[0] - 1, shape[1] - 1)}:
        if group_size:
            first, left = n // 128 * 128, k // 128 * 128
            part, scale = weight[first : first + 128, left : left + 128], found.scales[n // 128, k // 128]
        else:
            part, scale = weight[n], found.scales[n]
        assert float(scale) == pytest.approx(float(part.abs().max()) / 448.0, rel=1e-6)
    scale = fp8.spread(found.scales, shape, group_size).double()
    values = (weight / scale).abs()
    # Half a step: three bits of fraction, or what a subnormal can say.
    half = 2.0 ** (values.clamp(min=2.0**-6).log2().floor() - 4)
    assert ((found.dequantize(torch.float64) - weight).abs() <= 1.0001 * half * scale).all()
    blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
    assert found.scales.shape == (blocks if group_size else shape[:1])
    assert found.bits_per_weight == pytest.approx(8.0 + 32.0 * found.scales.numel() / weight.numel())


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    n=strategies.integers(1, 140), k=strategies.integers(1, 140), group_size=strategies.sampled_from(fp8.GROUP_SIZES),
    exponent=strategies.integers(-30, 30), seed=strategies.integers(0, 999),
)  # fmt: skip
def test_what_was_rounded_once_is_rounded_to_itself(n, k, group_size, exponent, seed):
    once = fp8.quantize(random_weight(n, k, seed=seed) * 2.0**exponent, group_size=group_size).dequantize(torch.float64)
    assert torch.equal(fp8.quantize(once, group_size=group_size).dequantize(torch.float64), once)


@pytest.mark.parametrize("group_size", fp8.GROUP_SIZES)
def test_zeros_tiny_and_huge_values(group_size):
    weight = random_weight(4 * 128, 130)
    weight[:128], weight[128:256], weight[256:384] = 0.0, weight[128:256] * 1e-300, weight[256:384] * 1e38
    found = fp8.quantize(weight, group_size=group_size)
    wide = found.dequantize(torch.float64)
    assert (found.scales > 0).all() and found.scales.isfinite().all() and not wide[:256].any()
    assert (found.scales[0] == 1.0).all()
    assert (wide[256:384] - weight[256:384]).norm() / weight[256:384].norm() < 0.03
    for empty in (torch.zeros(3, 0), torch.zeros(0, 5)):
        assert fp8.quantize(empty, group_size=group_size).dequantize().shape == empty.shape


def test_activations_by_row():
    x = random_weight(4, 16, torch.float32)
    x[1], x[2, 3], x[3, 5] = 0.0, float("nan"), float("inf")
    values, scales = fp8.quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    assert values[0].float().abs().max() == 448.0 and scales[1] == 1.0 and scales[2:].isnan().all()
    torch.testing.assert_close(values[0].float() * scales[0], x[0], rtol=1 / 16, atol=1e-4)


def test_bad_input_has_one_clear_message():
    w, blocks, nan = fp8.quantize(random_weight()), fp8.quantize(random_weight(), group_size=128), random_weight()
    nan[3, 5] = float("nan")
    poisoned = w.data.clone()
    poisoned.view(torch.uint8)[2, 3] = 0xFF
    wrong = [
        (ValueError, "fp8: row 3 of w has a NaN or an infinity", lambda: fp8.quantize(nan, "w")),
        (TypeError, "fp8: weight has dtype torch.int64", lambda: fp8.quantize(torch.ones(2, 3).long())),
        (ValueError, r"fp8: weight has shape \(3,\), expected \[N, K\]", lambda: fp8.quantize(torch.ones(3))),
        (ValueError, "fp8: group_size is 64, expected one of None .the whole row., 128",
         lambda: fp8.quantize(nan, group_size=64)),
        (TypeError, "fp8: symmetric=True is given, but", lambda: fp8.quantize(nan, symmetric=True)),
        (ValueError, "fp8: activations is 'int8', expected None or 'fp8'",
         lambda: fp8.quantize(random_weight(), activations="int8")),
        (ValueError, "fp8: row 0 of weight reaches 1.0e[+]300, expected less: scales are float32",
         lambda: fp8.quantize(torch.full((1, 2), 1e300, dtype=torch.float64))),
        (ValueError, r"data: torch.float8_e4m3fn \(6, 200\), expected torch.float8_e4m3fn \(6, 201\)",
         lambda: replace(w, shape=(6, 201))),
        (ValueError, r"fp8: data: torch.uint8 \(6, 200\), expected torch.float8_e4m3fn",
         lambda: replace(w, data=w.data.view(torch.uint8))),
        (ValueError, r"data's scales: torch.float32 \(1, 2\), expected torch.float32 \(6,\)",
         lambda: replace(blocks, group_size=None)),
        (ValueError, "fp8: zeros is given, expected None", lambda: replace(w, zeros=w.scales)),
        (ValueError, "fp8: up has a NaN, expected finite", lambda: fp8.check_values(replace(w, data=poisoned), "up")),
        (ValueError, "fp8: up's scales have a value that is not finite",
         lambda: fp8.check_values(replace(w, scales=w.scales / 0.0), "up")),
    ]  # fmt: skip
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
    fp8.check_values(w)
