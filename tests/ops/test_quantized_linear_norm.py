"""rms_norm_quantized_linear: it is the pair to the last bit, wrong norms are rejected, torch's own ways of calling."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as torch_functional

from llmkernels import functional, nn
from llmkernels.ops.norm.reference import rms_norm as reference_norm
from llmkernels.ops.quantized_linear import cases, norm_op
from llmkernels.ops.quantized_linear.cases import EPS, OPS, QuantizedLinearCase
from llmkernels.quantization.tensor import quantize_tensor
from llmkernels.testing.battery import expected, failures, judge_results
from llmkernels.testing.inputs import outputs_and_gradients, short_name
from tests.ops.test_quantized_linear import INTEGERS, integer_weight, refused
from tests.support import check_exported

HALF = (torch.float32, torch.bfloat16, torch.float16)
ROUNDED = ("w8a8", "w4a8", "fp8_dynamic")
fused = functional.rms_norm_quantized_linear


def hard_rows(K, dtype):
    """Rows with exact sums of squares; then zeros, squares that overflow, a NaN and an infinity."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-20, 21, (9, K), generator=generator).double() / 8.0
    x[1], x[2] = 0.0, x[2] * 2.0**-10
    x[3, 0] = torch.finfo(dtype).max / 2
    x[5, K // 2], x[6, K - 1] = float("nan"), float("-inf")
    return x.to(dtype)


@pytest.mark.parametrize("parameter", ("same", "fp32", "none"))
@pytest.mark.parametrize("dtype", HALF, ids=short_name)
@pytest.mark.parametrize("K", (24, 37, 4200))
@pytest.mark.parametrize("variant", ROUNDED)
def test_it_is_the_pair_to_the_last_bit(variant, K, dtype, parameter, backend, device, poison):
    """The normed row is rounded to the dtype of x before its integers are found, as if it had been written out."""
    if variant == "fp8_dynamic" and backend.startswith("cuda"):
        pytest.skip("fp8 activations have no CUDA kernel")
    x = hard_rows(K, dtype).to(device)
    generator = torch.Generator().manual_seed(6)
    weight = 1.0 + 0.1 * torch.randn(K, generator=generator)
    weight = None if parameter == "none" else weight.to(dtype if parameter == "same" else torch.float32).to(device)
    inputs = cases.make_inputs(QuantizedLinearCase(variant, 1, 20, K, dtype), device)
    y = fused(x, inputs.weight, inputs.bias, weight, EPS, backend=backend)
    if backend == "cpu":  # whose norm is another op, which may round its root in another way
        normed = functional.rms_norm(x, (K,), weight, EPS, backend=backend)
    else:
        normed = reference_norm(x, None, weight, (K,), EPS, 0.0)
    pair = functional.quantized_linear(normed, inputs.weight, inputs.bias, backend=backend)
    torch.testing.assert_close(y, pair, rtol=0, atol=0, equal_nan=True)
    assert y[[5, 6]].isnan().all() and y[[0, 1, 2, 4, 7, 8]].isfinite().all()
    assert torch.equal(y[1], inputs.bias)


@pytest.mark.parametrize("dtype", HALF, ids=short_name)
@pytest.mark.parametrize("M", (1, 3, 20, 70))
@pytest.mark.parametrize("variant", INTEGERS)
def test_small_integers_are_exact(variant, M, dtype, backend, device, poison):
    """Rows of ones with signs have the mean square one: what is multiplied are the integers of the norm's weight."""
    N, K = 45, 204
    refused(QuantizedLinearCase(variant, M, N, K, dtype), backend, device)
    weight, codes = integer_weight(variant, N, K, device)
    generator = torch.Generator().manual_seed(9)
    x = 2 * torch.randint(0, 2, (M, K), generator=generator) - 1
    norm_weight = torch.randint(-3, 4, (K,), generator=generator)
    if weight.activations:
        norm_weight[-1] = 127 if weight.activations == "int8" else 448  # the largest of a row: all scales are one
    given = [tensor.to(dtype).to(device) for tensor in (x, norm_weight)]
    y = fused(given[0], weight, None, given[1], 0.0, backend=backend)
    assert torch.equal(y.cpu(), (0.5 * ((x * norm_weight) @ codes.t())).to(dtype))


def wrong_norms(x, weight):
    """What wrong kernels would make of the norm's arguments."""
    K = x.shape[1]
    normed = lambda x, rstd, weight: (x.float() * rstd * weight.float()).to(x.dtype)
    squares = x.float().square()
    rstd = (squares.mean(-1, keepdim=True) + EPS).rsqrt()
    centered = x.float() - x.float().mean(-1, keepdim=True)
    yield "the weight lost", normed(x, rstd, torch.ones_like(weight))
    yield "the weight of the next column", normed(x, rstd, weight.roll(1))
    yield "the root of the next row", normed(x, rstd.roll(1, 0), weight)
    yield "the last column lost", normed(x, (squares[:, :-1].sum(-1, keepdim=True) / K + EPS).rsqrt(), weight)
    yield "the mean subtracted", normed(centered.to(x.dtype), rstd, weight)
    yield "eps added to the root", normed(x, 1.0 / (squares.mean(-1, keepdim=True).sqrt() + 0.03), weight)
    yield "no norm", normed(x, torch.ones_like(rstd), weight)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
@pytest.mark.parametrize("variant", ("int8", *ROUNDED))
def test_wrong_kernels_are_rejected(variant, dtype):
    case = QuantizedLinearCase(variant, 4, 130, 48, dtype, op=OPS[1])
    inputs = cases.make_inputs(case)
    inputs.x[:, -1] = 3.0
    known = expected(cases, case, inputs)
    right = outputs_and_gradients(inputs, lambda leaves: cases.call(case, leaves, "torch"))
    assert failures(judge_results(cases, case, inputs, right, known)) == []
    linear = lambda x: functional.quantized_linear(x, inputs.weight, inputs.bias, backend="torch")
    for name, normed in wrong_norms(inputs.x, inputs.norm_weight):
        assert failures(judge_results(cases, case, inputs, right | {"y": linear(normed)}, known)), name
    for name in ("dx", "dnorm_weight"):
        assert failures(judge_results(cases, case, inputs, right | {name: 1.02 * right[name]}, known)), name


def test_gradients_of_a_wide_weight_any_rank_and_a_second_order(backend, device, poison):
    K = 48
    weight = cases.make_inputs(QuantizedLinearCase("w8a8", 1, 20, K), device).weight
    x = (torch.randint(-20, 21, (2, 3, K)) / 8.0).bfloat16().to(device).requires_grad_()
    norm_weight = (1.0 + 0.1 * torch.randn(K)).to(device).requires_grad_()
    y = fused(x, weight, None, norm_weight, EPS, backend=backend)
    normed = functional.rms_norm(x, (K,), norm_weight, EPS, backend="torch")
    assert y.shape == (2, 3, 20) and y.dtype == torch.bfloat16
    pair = functional.quantized_linear(normed, weight, backend=backend)
    torch.testing.assert_close(y, pair, rtol=0.01, atol=0.01)
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(each, (x, norm_weight), dy, retain_graph=True) for each in (y, pair))
    assert ours[1].dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (twice,) = torch.autograd.grad(dx.float().square().sum(), norm_weight)
    (dx,) = torch.autograd.grad(pair, x, dy, create_graph=True)
    torch.testing.assert_close(
        twice, torch.autograd.grad(dx.float().square().sum(), norm_weight)[0], rtol=0.1, atol=0.5
    )
    with torch.no_grad():
        assert torch.equal(fused(x, weight, None, norm_weight, EPS, backend=backend), y)


def test_autocast_orders_and_the_default_of_eps():
    K = 64
    weight, x, norm_weight = quantize_tensor(torch.randn(8, K), "w8a8"), torch.randn(3, K), torch.rand(K) + 0.5
    assert torch.equal(fused(x, weight), fused(x, weight, eps=torch.finfo(torch.float32).eps))
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(x, weight, None, norm_weight)
        assert y.dtype == torch.bfloat16
        pair = functional.quantized_linear(functional.rms_norm(x, (K,), norm_weight), weight)
        assert torch.equal(y, pair)
    ordered = replace(quantize_tensor(torch.randn(8, K), "int4", group_size=32), order=torch.randperm(K))
    expected = torch_functional.linear(functional.rms_norm(x, (K,), norm_weight, EPS), ordered.dequantize())
    torch.testing.assert_close(fused(x, ordered, None, norm_weight, EPS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ("int4", "w8a8"))
def test_exported_programs_run_where_no_kernel_is(scheme, tmp_path):
    weight, norm_weight = quantize_tensor(torch.randn(6, 64), scheme), torch.rand(64) + 0.5

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in weight.parts.items():
                self.register_buffer(name, part)

        def forward(self, x, norm_weight):
            parts, kind = (self.data, self.scales, None, None), (weight.format, weight.group_size or 0)
            return norm_op.run(x, parts, (6, 64), (*kind, weight.activations or ""), None, norm_weight, EPS)

    x = (torch.randint(-20, 21, (4, 64)) / 8.0).float()
    expected = fused(x, weight, None, norm_weight, EPS)
    program = torch.export.export(Layer(), (x, norm_weight))
    check_exported(program, "rms_norm_quantized_linear_fwd", (x, norm_weight), expected, tmp_path)
    public = torch.ops.llmkernels.rms_norm_quantized_linear(
        x, weight.data, weight.scales, None, None, None, None, norm_weight, 64, format=weight.format,
        group_size=weight.group_size or 0, activations=weight.activations or "", eps=EPS,
    )  # fmt: skip
    assert torch.equal(public, expected)


@pytest.mark.parametrize("scaled", (False, True))
@pytest.mark.parametrize("scheme", ("int8", "w8a8"))
def test_a_module_norms_its_input(scheme, scaled):
    """With a scale of the input (calibration) too, which belongs behind the norm."""
    weight, norm = quantize_tensor(torch.randn(6, 64), scheme), nn.RMSNorm(64, eps=EPS)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    layer = nn.QuantizedLinear.from_tensor(weight, torch.randn(6), torch.rand(64) + 0.5 if scaled else None)
    x = (torch.randint(-20, 21, (4, 64)) / 8.0).float()
    y = layer(x, norm_weight=norm.weight, norm_eps=norm.eps)
    torch.testing.assert_close(y, layer(norm(x)), rtol=1e-6, atol=1e-6)
    (dweight,) = torch.autograd.grad(y.square().sum(), norm.weight)
    assert dweight.abs().min() > 0.0
    torch.testing.assert_close(layer(x, norm_eps=0.5), layer(functional.rms_norm(x, (64,), None, 0.5)))
    with pytest.raises(ValueError, match="norm_weight is given without norm_eps"):
        layer(x, norm_weight=norm.weight)


def test_bad_input_has_one_clear_message():
    weight, x = quantize_tensor(torch.randn(6, 64), "w8a8"), torch.randn(3, 64)
    wrong = [
        (TypeError, "rms_norm_quantized_linear: weight is a Tensor, expected a Quant", lambda: fused(x, x)),
        (
            ValueError,
            r"rms_norm_quantized_linear: input has shape \(3, 63\), expected 64",
            lambda: fused(x[:, 1:], weight),
        ),
        (TypeError, "rms_norm_quantized_linear: input has dtype torch.int64", lambda: fused(x.long(), weight)),
        (ValueError, r"rms_norm_quantized_linear: bias has shape \(5,\)", lambda: fused(x, weight, torch.ones(5))),
        (
            ValueError,
            r"norm_weight has shape \(63,\), expected \(64,\)",
            lambda: fused(x, weight, None, torch.ones(63)),
        ),
        (TypeError, "norm_weight has dtype torch.int64", lambda: fused(x, weight, None, torch.ones(64).long())),
        (ValueError, "norm_weight is on meta", lambda: fused(x, weight, None, torch.ones(64, device="meta"))),
    ]
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
