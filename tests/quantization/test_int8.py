"""int8: what the bits are, that integers are exact, what is refused."""

from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies

from llmkernels.quantization import int8
from llmkernels.quantization.tensor import QuantizedTensor


def random_weight(n=6, k=40, dtype=torch.float32, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_every_weight_is_within_half_a_step(dtype):
    weight = random_weight(dtype=dtype) * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None].to(dtype)
    found = int8.quantize(weight)
    wide = weight.double()
    torch.testing.assert_close(found.scales, (wide.abs().amax(1) / 127).float())
    error = (found.dequantize(torch.float64) - wide).abs()
    assert (error <= 0.5001 * found.scales.double()[:, None]).all()
    assert (found.data.abs().amax(1) == 127).all() and found.data.dtype == torch.int8
    assert found.dequantize().dtype == dtype and found.shape == (6, 40)
    assert found.bits_per_weight == 8 + 32 / 40 and "int8, [6, 40], 8.80 bits" in repr(found)


def test_the_bits():
    scale = torch.tensor([0.5, 2.0])
    integers = torch.tensor([[127, -127, 1, 0], [-1, 5, -64, 127]])
    found = int8.quantize(integers * scale[:, None])
    assert torch.equal(found.scales, scale) and torch.equal(int8.unpack(found.data), integers.int())
    assert found.data.view(torch.uint8).tolist() == [[0x7F, 0x81, 0x01, 0x00], [0xFF, 0x05, 0xC0, 0x7F]]
    assert torch.equal(int8.pack(integers), found.data)
    assert torch.equal(
        int8.quantize(torch.tensor([[0.5, 1.5, -2.5, 127.0]])).data, torch.tensor([[0, 2, -2, 127]]).char()
    )


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    n=strategies.integers(0, 4), k=strategies.integers(0, 70),
    exponent=strategies.integers(-30, 30), seed=strategies.integers(0, 999),
)  # fmt: skip
def test_what_was_rounded_once_is_rounded_to_itself(n, k, exponent, seed):
    first = int8.quantize(random_weight(n, k, torch.float64, seed) * 2.0**exponent)
    once = first.dequantize(torch.float64)
    again = int8.quantize(once)
    assert torch.equal(again.data, first.data) and torch.equal(again.dequantize(torch.float64), once)
    assert torch.equal(int8.pack(int8.unpack(first.data)), first.data)


def test_rows_of_zeros_tiny_and_huge_values():
    weight = random_weight(4, 8, torch.float64)
    weight[1] = 0.0
    weight[2] *= 1e-300
    weight[3] *= 1e37
    found = int8.quantize(weight)
    assert (found.scales > 0).all() and found.scales.isfinite().all()
    assert not found.data[1:3].any() and not found.dequantize()[1:3].any()
    torch.testing.assert_close(found.dequantize()[3], weight[3], rtol=0, atol=float(weight[3].abs().max()) / 250)
    assert int8.quantize(torch.zeros(3, 0)).dequantize().shape == (3, 0)
    subnormal = torch.full((1, 3), 1e-43)
    assert int8.quantize(subnormal).data.abs().max() <= 127


@pytest.mark.parametrize("columns", (1, 3, int8.EXACT_COLUMNS, int8.EXACT_COLUMNS + 1, 5000))
def test_integer_products_are_exact(columns):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-127, 128, (n, columns), generator=generator, dtype=torch.int8) for n in (5, 7))
    a[0], b[0] = 127, -127
    expected = (a.long() @ b.long().t()).int()
    assert torch.equal(int8.integer_product(a, b), expected)
    assert torch.equal(int8.integer_product(a, b.float()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8.integer_product(a, b), expected)


def test_linear_is_exact_on_integers_and_near_on_others():
    generator = torch.Generator().manual_seed(2)
    x, w = (torch.randint(-127, 128, (n, 50), generator=generator).float() for n in (5, 7))
    x[:, 0], w[:, 0] = 127.0, -127.0  # the largest of each row, so that all scales are one
    assert torch.equal(int8.linear(x, int8.quantize(w)), x @ w.t())
    x, w, bias = random_weight(20, 256, seed=3), random_weight(30, 256, seed=4), random_weight(1, 30, seed=5)[0]
    y, truth = int8.linear(x, int8.quantize(w), bias).double(), x.double() @ w.double().t() + bias
    error = (y - truth).norm() / truth.norm()
    assert 1e-4 < error < 0.012, error  # two roundings of normal values, each 0.6 % of their size


def test_activations_by_row():
    x = random_weight(4, 16)
    x[1], x[2, 3], x[3, 5] = 0.0, float("nan"), float("inf")
    values, scales = int8.quantize_rows(x)
    torch.testing.assert_close(values[:2] * scales[:2], x[:2], rtol=0, atol=float(scales[0]) / 2)
    assert scales[1] == 1.0 and scales[2:].isnan().all()
    y = int8.linear(x, int8.quantize(random_weight(3, 16, seed=1)))
    assert y[:2].isfinite().all() and y[2:].isnan().all()


def test_bad_input_has_one_clear_message():
    nan, infinite, w = random_weight(), random_weight(), int8.quantize(random_weight())
    nan[3, 5], infinite[2, 0] = float("nan"), -float("inf")
    wrong = [
        (ValueError, "int8: row 3 of w_hh has a NaN or an infinity", lambda: int8.quantize(nan, "w_hh")),
        (ValueError, "int8: row 2 of weight has a NaN or an infinity", lambda: int8.quantize(infinite)),
        (ValueError, "int8: row 0 of weight reaches", lambda: int8.quantize(1e300 * torch.ones(1, 2).double())),
        (TypeError, "int8: weight has dtype torch.int64", lambda: int8.quantize(torch.ones(2, 3).long())),
        (ValueError, r"int8: weight has shape \(3,\), expected \[N, K\]", lambda: int8.quantize(torch.ones(3))),
        (ValueError, "int8: values are -128 to 0, expected -127 to 127", lambda: int8.pack(torch.tensor([[-128, 0]]))),
        (ValueError, "format is 'int3', expected one of int8",
         lambda: QuantizedTensor("int3", (6, 40), w.data, w.scales)),
        (ValueError, r"data: torch.int8 \(6, 40\), expected torch.int8 \(6, 41\)",
         lambda: QuantizedTensor("int8", (6, 41), w.data, w.scales)),
        (ValueError, "scales: torch.float64", lambda: QuantizedTensor("int8", (6, 40), w.data, w.scales.double())),
        (ValueError, "int8: data has a -128", lambda: int8.check_values(replace(w, data=w.data * 0 - 128))),
        (ValueError, "scales have a value that is not finite",
         lambda: int8.check_values(replace(w, scales=w.scales * 0))),
    ]  # fmt: skip
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
