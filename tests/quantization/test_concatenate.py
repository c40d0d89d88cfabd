"""concatenate: weights of one input under each other, bit by bit, and which cannot be."""

from dataclasses import replace

import pytest
import torch

from llmkernels import functional
from llmkernels.ops.quantized_linear.cases import VARIANTS
from llmkernels.quantization.tensor import concatenate, quantize_tensor


def make(variant, *rows, K=200):
    scheme, options = VARIANTS[variant]
    return [quantize_tensor(torch.randn(N, K), scheme, **options) for N in rows]


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "nf4_double"])
def test_rows_stay_what_they_were(variant):
    weights = make(variant, 256, 128, 40)
    whole = concatenate(weights)
    assert (
        whole.shape == (424, 200)
        and whole.scheme == weights[0].scheme
        and whole.nbytes == sum(w.nbytes for w in weights)
    )
    assert torch.equal(whole.dequantize(), torch.cat([weight.dequantize() for weight in weights]))
    x, norm_weight = torch.randn(3, 200), torch.rand(200) + 0.5
    y = functional.rms_norm_quantized_linear(x, whole, None, norm_weight, 1e-6, backend="torch")
    apart = [functional.rms_norm_quantized_linear(x, w, None, norm_weight, 1e-6, backend="torch") for w in weights]
    torch.testing.assert_close(y, torch.cat(apart, -1), rtol=1e-5, atol=1e-5)
    assert torch.equal(concatenate(weights[:1]).data.view(torch.uint8), weights[0].data.view(torch.uint8))


def test_orders():
    order = torch.randperm(200)
    a, b = (replace(weight, order=order) for weight in make("int4", 5, 7))
    assert torch.equal(concatenate((a, b)).dequantize(), torch.cat((a.dequantize(), b.dequantize())))
    with pytest.raises(ValueError, match="the columns of weight 1 are stored in another order"):
        concatenate((a, replace(b, order=order.flip(0))))


@pytest.mark.parametrize(
    "weights, message",
    [
        (lambda: [], "weights is empty"),
        (lambda: make("int8", 4) + make("w8a8", 4), "scheme of weight 1 is w8a8, expected int8, weight 0's"),
        (lambda: make("int4", 4) + make("int4_32", 4), "group_size of weight 1 is 32, expected 64"),
        (lambda: make("int4", 4) + make("int4_zeros", 4), "parts of weight 1 is data, scales, zeros, expected"),
        (lambda: make("int8", 4) + make("int8", 4, K=64), "columns of weight 1 is 64, expected 200"),
        (lambda: [*make("int4_row", 4), quantize_tensor(torch.randn(4, 200), "int4", group_size=None)],
         "dtype of scales of weight 1 is torch.bfloat16, expected torch.float32"),
        (lambda: make("nf4_double", 4, 4), "nf4 with double=True, whose scales share numbers"),
        (lambda: make("fp8_block", 130, 4), "weight 0 has 130 rows, expected whole blocks of 128"),
    ],
)  # fmt: skip
def test_what_cannot_be_has_one_clear_message(weights, message):
    with pytest.raises(ValueError, match=f"concatenate: .*{message}"):
        concatenate(weights())
