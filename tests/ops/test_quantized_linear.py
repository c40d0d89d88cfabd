"""quantized_linear: integers are exact, wrong kernels are rejected, what is refused, torch's own ways of calling."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as torch_functional

import llmkernels
from llmkernels import functional
from llmkernels.ops.quantized_linear import cases, op, reference
from llmkernels.ops.quantized_linear.cases import VARIANTS, QuantizedLinearCase
from llmkernels.quantization import SCHEMES, _groups, int4, nf4
from llmkernels.quantization.tensor import QuantizedTensor, quantize_tensor
from llmkernels.testing.battery import evaluate, expected, failures, judge_results
from llmkernels.testing.inputs import short_name
from tests.support import check_exported

INTEGERS = [variant for variant in VARIANTS if not variant.startswith("nf4")]
HALF = (torch.float32, torch.bfloat16, torch.float16)


def refused(case, backend, device):
    try:
        cases.call(case, cases.make_inputs(case, device), backend)
    except llmkernels.NoBackendError as error:
        pytest.skip(str(error).split(": ", 2)[-1])


def integer_weight(variant, N, K, device):
    """A weight of random small integers times 1/2, whose products are exact in every type."""
    generator = torch.Generator().manual_seed(7)
    weight = cases._weight(QuantizedLinearCase(variant, 1, N, K), 0)
    codes = torch.randint(-7, 8, (N, K), generator=generator)
    scales, zeros = torch.full_like(weight.scales, 0.5), None
    if weight.format == "int4":
        middle = torch.full((N, K), 8)
        if weight.zeros is not None:
            zeros = torch.randint(7, 9, weight.zeros.shape, generator=generator, dtype=torch.uint8)
            middle = _groups.spread(zeros, K, weight.group_size).long()
        data = int4.pack(codes + middle)
    else:
        data = codes.to(weight.data.dtype)
    parts = {"data": data, "scales": scales, "zeros": zeros}
    return replace(weight, **{name: None if part is None else part.to(device) for name, part in parts.items()}), codes


@pytest.mark.parametrize("dtype", HALF, ids=short_name)
@pytest.mark.parametrize("M", (1, 3, 20, 70))
@pytest.mark.parametrize("variant", INTEGERS)
def test_small_integers_are_exact(variant, M, dtype, backend, device, poison):
    N, K = 45, 204
    refused(QuantizedLinearCase(variant, M, N, K, dtype), backend, device)
    weight, codes = integer_weight(variant, N, K, device)
    generator = torch.Generator().manual_seed(8)
    x = torch.randint(-3, 4, (M, K), generator=generator)
    if weight.activations:
        x[:, -1] = 127 if weight.activations == "int8" else 448  # the largest of a row: all scales are one
    bias = torch.randint(-20, 20, (N,), generator=generator)
    dy = torch.randint(-3, 4, (M, N), generator=generator)
    leaf = x.to(dtype).to(device).requires_grad_()
    y = functional.quantized_linear(leaf, weight, bias.to(dtype).to(device), backend=backend)
    (dx,) = torch.autograd.grad(y, leaf, dy.to(dtype).to(device))
    exact = (0.5 * (x @ codes.t())).double() + bias
    assert torch.equal(y.cpu(), exact.to(dtype))
    assert torch.equal(dx.cpu(), (0.5 * (dy @ codes)).to(dtype))


def wrong_weights(variant, weight):
    """The same weight as a wrong kernel would read it."""
    K = weight.shape[1]
    wrong = {"a scale off by 2 %": replace(weight, scales=(weight.scales.float() * 1.02).to(weight.scales.dtype))}
    if weight.format in ("int4", "nf4"):
        codes = _groups.unpack_nibbles(weight.data, K).clone()
        swapped = torch.stack((codes[:, 1::2], codes[:, 0::2]), 2).flatten(1)
        wrong["nibbles swapped"] = replace(weight, data=_groups.pack_nibbles(swapped))
        axis, word = (1, "group") if weight.group_size else (0, "row")
        wrong[f"scales of the next {word}"] = replace(weight, scales=weight.scales.roll(1, axis))
        codes[:, -1] = 7 if weight.format == "nf4" else 8
        wrong["the last column lost"] = replace(weight, data=_groups.pack_nibbles(codes))
    else:
        lost = weight.data.clone()
        lost.view(torch.uint8)[:, -1] = 0
        wrong["the last column lost"] = replace(weight, data=lost)
        wrong["scales of the next row"] = replace(weight, scales=weight.scales.roll(1, 0))
    if weight.zeros is not None:
        wrong["a zero point off by one"] = replace(weight, zeros=weight.zeros + 1)
        wrong["zero points of the next group"] = replace(weight, zeros=weight.zeros.roll(1, 1))
    if weight.second_scales is not None:
        second = weight.second_scales.clone()
        second[0] = 0.0
        wrong["the mean of the scales lost"] = replace(weight, second_scales=second)
    # Rounding to bf16 hides much of the difference.
    if weight.activations is not None and weight.dtype == torch.float32:
        wrong["activations not rounded"] = replace(weight, activations=None)
    return wrong


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_wrong_kernels_are_rejected(variant, dtype):
    case = QuantizedLinearCase(variant, 4, 130, 256, dtype)
    inputs = cases.make_inputs(case)
    known = expected(cases, case, inputs)
    assert failures(judge_results(cases, case, inputs, evaluate(cases, case, inputs, "torch"), known)) == []
    wrong = wrong_weights(variant, inputs.weight)
    assert len(wrong) >= 3
    for name, weight in wrong.items():
        results = evaluate(cases, case, inputs.replace(weight=weight), "torch")
        assert failures(judge_results(cases, case, inputs, results, known)), name
    no_bias = evaluate(cases, case, inputs.replace(bias=torch.zeros_like(inputs.bias)), "torch")
    assert failures(judge_results(cases, case, inputs, no_bias, known)), "the bias lost"


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_rank_and_layout(variant, backend, device, poison):
    case = QuantizedLinearCase(variant, 6, 40, 128, torch.bfloat16)
    refused(case, backend, device)
    inputs = cases.make_inputs(case, device)
    (y,) = cases.call(case, inputs, backend)
    for x, shape in ((inputs.x.view(2, 3, 128), (2, 3, 40)), (inputs.x.t().contiguous().t(), (6, 40))):
        again = functional.quantized_linear(x, inputs.weight, inputs.bias, backend=backend)
        assert again.shape == shape and torch.equal(again.view(6, 40), y)
    one = functional.quantized_linear(inputs.x[0], inputs.weight, inputs.bias, backend=backend)
    torch.testing.assert_close(one, y[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("variant", ("w8a8", "w4a8", "fp8_dynamic"))
def test_rows_with_a_nan_or_an_infinity_alone_are_nan(variant, backend, device):
    case = QuantizedLinearCase(variant, 5, 24, 64)
    refused(case, backend, device)
    inputs = cases.make_inputs(case, device)
    inputs.x[1, 3], inputs.x[3, 0] = float("nan"), float("inf")
    (y,) = cases.call(case, inputs, backend)
    assert y[[1, 3]].isnan().all() and y[[0, 2, 4]].isfinite().all()


def test_columns_in_another_order():
    weight = quantize_tensor(torch.randn(8, 64), "int4", group_size=32)
    order = torch.randperm(64)
    stored = replace(weight, order=order)
    x = torch.randn(3, 64, requires_grad=True)
    torch.testing.assert_close(stored.dequantize()[:, order], weight.dequantize())
    y = functional.quantized_linear(x, stored)
    torch.testing.assert_close(y, torch_functional.linear(x, stored.dequantize()))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, stored.dequantize().sum(0).expand(3, 64))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_double_backward_forward_mode_and_vmap(scheme):
    weight = quantize_tensor(torch.randn(5, 64, dtype=torch.float64), scheme)
    x, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 64), (5,)))
    linear = lambda x, bias: functional.quantized_linear(x, weight, bias)
    dy = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    dx, dbias = torch.autograd.grad(linear(x, bias), (x, bias), dy, create_graph=True)
    (twice,) = torch.autograd.grad(dx.square().sum() + dbias.square().sum(), dy)
    torch.testing.assert_close(twice, 2.0 * dx @ weight.dequantize().t() + 2.0 * dbias)
    tangent = torch.randn_like(x)
    y, jvp = torch.func.jvp(lambda x: linear(x, bias), (x,), (tangent,))
    torch.testing.assert_close(y, linear(x, bias), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(jvp, tangent @ weight.dequantize().t())
    torch.testing.assert_close(torch.func.vmap(lambda row: linear(row, bias))(x), linear(x, bias), rtol=1e-6, atol=1e-6)


def test_autocast_converts_as_for_linear():
    weight = quantize_tensor(torch.randn(8, 32), "int8")
    x, bias = torch.randn(3, 32, requires_grad=True), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.quantized_linear(x, weight, bias)
        assert y.dtype == torch_functional.linear(x, weight.dequantize(), bias).dtype == torch.bfloat16
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.dtype == torch.float32


@pytest.mark.parametrize("scheme", ("int8", "int4", "w8a8"))
def test_exported_programs_run_where_no_kernel_is(scheme, tmp_path):
    weight = quantize_tensor(torch.randn(6, 64), scheme)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in weight.parts.items():
                self.register_buffer(name, part)

        def forward(self, x):
            parts = (self.data, self.scales, None, None)
            return op.run(x, parts, (6, 64), (weight.format, weight.group_size or 0, weight.activations or ""), None)

    x = torch.randn(4, 64)
    expected = functional.quantized_linear(x, weight)
    program = torch.export.export(Layer(), (x,))
    check_exported(program, "quantized_linear_fwd", (x,), expected, tmp_path)
    public = torch.ops.llmkernels.quantized_linear(
        x, weight.data, weight.scales, None, None, None, None, 64, format=weight.format,
        group_size=weight.group_size or 0, activations=weight.activations or "",
    )  # fmt: skip
    assert torch.equal(public, expected)


def test_bad_input_has_one_clear_message():
    weight, x = quantize_tensor(torch.randn(6, 64), "int8"), torch.randn(3, 64)
    linear = functional.quantized_linear
    wrong = [
        (TypeError, "quantized_linear: weight is a Tensor, expected a QuantizedTensor", lambda: linear(x, x)),
        (ValueError, r"input has shape \(3, 63\), expected 64 columns", lambda: linear(x[:, 1:], weight)),
        (ValueError, r"input has shape \(\), expected 64 columns", lambda: linear(torch.ones(()), weight)),
        (TypeError, "input has dtype torch.int64", lambda: linear(x.long(), weight)),
        (ValueError, r"bias has shape \(5,\), expected \(6,\)", lambda: linear(x, weight, torch.ones(5))),
        (TypeError, "bias has dtype torch.int64", lambda: linear(x, weight, torch.ones(6).long())),
        (ValueError, "weight is on cpu, expected meta", lambda: linear(x.to("meta"), weight)),
        (ValueError, "scheme is 'int3', expected one of int8, int4", lambda: quantize_tensor(x, "int3")),
        (ValueError, "int4: group_size is 48, expected one of 32, 64, 128, None",
         lambda: quantize_tensor(x, "int4", group_size=48)),
        (TypeError, "int8: group_size=64 is given, but", lambda: quantize_tensor(x, "int8", group_size=64)),
        (ValueError, "fp8: group_size is 64", lambda: quantize_tensor(x, "fp8", group_size=64)),
        (ValueError, "nf4: activations is 'int8', expected None",
         lambda: replace(quantize_tensor(x, "nf4"), activations="int8")),
        (ValueError, "int4: data's scales: torch.bfloat16",
         lambda: replace(quantize_tensor(x, "int4"), group_size=32)),
        (ValueError, "int8: zeros is given, expected None", lambda: replace(weight, zeros=weight.scales)),
        (ValueError, "int8: order: torch.int64", lambda: replace(weight, order=torch.arange(63))),
    ]  # fmt: skip
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()


def test_reference_of_groups_is_the_definition():
    """Sums over groups by hand, one element at a time."""
    weight = quantize_tensor(torch.randn(3, 70, dtype=torch.float64), "w4a8", group_size=32, symmetric=False)
    x = torch.randn(2, 70, dtype=torch.float64)
    y = functional.quantized_linear(x, weight, backend="torch")
    values, x_scales = reference.int8.quantize_rows(x)
    codes = int4.unpack(weight.data, 70).int()
    for m in range(2):
        for n in range(3):
            total = sum(
                float(weight.scales[n, k // 32])
                * int(values[m, k])
                * (int(codes[n, k]) - int(weight.zeros[n, k // 32]))
                for k in range(70)
            )
            torch.testing.assert_close(y[m, n], torch.tensor(total * float(x_scales[m, 0]), dtype=torch.float64))


def test_nf4_levels_are_quantiles_of_the_normal_distribution():
    """Appendix E: from evenly spaced probabilities, an offset of which leaves the ends out; both halves share zero."""
    offset = 0.5 * (1 / 32 + 1 / 30)
    normal = torch.distributions.Normal(0.0, 1.0)
    upper = normal.icdf(torch.linspace(1 - offset, 0.5, 9, dtype=torch.float64)[:-1])
    lower = normal.icdf(torch.linspace(1 - offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((-lower, torch.zeros(1), upper)).sort().values
    torch.testing.assert_close(torch.tensor(nf4.LEVELS, dtype=torch.float64), levels / levels.max(), rtol=0, atol=1e-5)
    weight = quantize_tensor(torch.tensor([[*nf4.LEVELS]], dtype=torch.float64), "nf4", group_size=None)
    assert _groups.unpack_nibbles(weight.data, 16).tolist() == [list(range(16))]
    assert isinstance(weight, QuantizedTensor) and torch.equal(weight.scales.float(), torch.ones(1, 1))
