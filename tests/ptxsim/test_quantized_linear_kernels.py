"""The CUDA kernels of quantized_linear beyond the battery of tests/ops: which one runs, every code of every format, sums
in parts, pointers of any alignment, the rounding of activations to the bit, schedules."""

import dataclasses

import pytest
import torch

from llmkernels.ops.quantized_linear import cases, reference
from llmkernels.ops.quantized_linear.cases import VARIANTS, QuantizedLinearCase
from llmkernels.quantization import SCHEMES, int4, int8
from llmkernels.quantization.tensor import QuantizedTensor, quantize_tensor
from llmkernels.testing.battery import evaluate, failures, judge
from tests.ptxsim import backend as simulated
from tests.ptxsim import sim

pytestmark = pytest.mark.skipif(sim.absent() is not None, reason=f"ptxsim: {sim.absent()}")
on_both = pytest.mark.parametrize("backend", tuple(simulated.CUDA))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MATVEC, TOKENS, DX = "quantized_matvec", "quantized_tokens", "quantized_dx"
ROUND, INT8, W4A8, SPLITS = "quantized_round", "quantized_int8", "quantized_w4a8", "quantized_splits"


def kernel(backend: str, name: str):
    return getattr(getattr(torch.ops, f"llmkernels_{backend.replace('-', '_')}"), name).default


def forward(backend: str, x: torch.Tensor, weight: QuantizedTensor, bias=None) -> torch.Tensor:
    parts = (weight.data, weight.scales, weight.zeros, weight.second_scales, bias)
    kind = (weight.format, weight.group_size or 0, weight.activations or "")
    return kernel(backend, "quantized_linear_fwd")(x, *parts, *kind)


def backward(backend: str, dy: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    parts = (weight.data, weight.scales, weight.zeros, weight.second_scales)
    return kernel(backend, "quantized_linear_bwd")(dy, *parts, weight.shape[1], weight.format, weight.group_size or 0)


def launched(case: QuantizedLinearCase, backend: str) -> list[tuple[str, int]]:
    """(kernel, parts of K) of every launch of forward and backward."""
    with sim.device(record=True) as launches:
        evaluate(cases, case, cases.make_inputs(case), backend)
    name = lambda launch: launch["kernel"].split("_kernel<")[0].rpartition("::")[2]
    return [(name(launch), launch["grid"][1]) for launch in launches.all]


@pytest.mark.parametrize(
    "variant, M, dtype, ways",
    [
        ("int4", 1, torch.float32, [MATVEC]),
        ("int8", 8, torch.float32, [MATVEC]),
        ("int4", 1, torch.bfloat16, [TOKENS]),
        ("nf4", 64, torch.float16, [TOKENS]),
        ("w8a8", 3, torch.float32, [ROUND, INT8]),
        ("w8a8", 200, torch.bfloat16, [ROUND, INT8]),
        ("w4a8", 1, torch.float16, [ROUND, W4A8]),
    ],
)
def test_which_kernel_runs(variant, M, dtype, ways):
    assert launched(QuantizedLinearCase(variant, M, 40, 64, dtype), "cuda-sim-sm80") == [
        (way, 1) for way in [*ways, DX]
    ]


def test_the_norm_is_in_the_kernel_that_rounds():
    norm = cases.OPS[1]
    case = QuantizedLinearCase("w8a8", 3, 40, 64, torch.bfloat16, op=norm)
    kernels = [name for name, _ in launched(case, "cuda-sim-sm80")]
    assert kernels[:2] == [ROUND, INT8] and DX in kernels and "norm_bwd" in "".join(kernels)
    assert "norm_fwd" not in "".join(kernels)
    kernels = [name for name, _ in launched(dataclasses.replace(case, variant="int4"), "cuda-sim-sm80")]
    assert kernels[:2] == ["norm_fwd", TOKENS]


# Of each kernel a K that is cut into several parts, unequal ones, and an N and M that fill no tile.
PARTS = [
    (QuantizedLinearCase("int4", 1, 40, 12500, torch.float32), 4),
    (QuantizedLinearCase("int4", 1, 40, 4000, torch.bfloat16), 8),
    (QuantizedLinearCase("int8", 3, 20, 5000, torch.float32), 3),
    (QuantizedLinearCase("nf4", 7, 20, 2500, torch.float32), 3),
    (QuantizedLinearCase("int4_32", 7, 150, 1700, torch.bfloat16), 3),
    (QuantizedLinearCase("int4_128_zeros", 20, 40, 1100, torch.float16), 2),
    (QuantizedLinearCase("int8", 60, 40, 1100, torch.bfloat16), 2),
    (QuantizedLinearCase("w8a8", 5, 150, 1700, torch.bfloat16), 3),
    (QuantizedLinearCase("w8a8", 30, 40, 1100, torch.float32), 2),
    (QuantizedLinearCase("w8a8", 70, 40, 1100, torch.float16, bias=False), 2),
    (QuantizedLinearCase("w4a8_row", 5, 150, 1700, torch.float32), 3),
    (QuantizedLinearCase("w4a8_zeros", 70, 40, 1100, torch.bfloat16), 2),
    (QuantizedLinearCase("w8a8", 5, 150, 1700, torch.bfloat16, op=cases.OPS[1]), 3),
]


@pytest.mark.parametrize("case, parts", PARTS, ids=str)
@on_both
def test_sums_in_parts(case, parts, backend):
    with sim.device(multiprocessors=16):
        assert failures(judge(cases, case, backend)) == []
        kernels = launched(case, backend)
    assert {grid for name, grid in kernels if name in (MATVEC, TOKENS, INT8, W4A8)} == {parts}
    assert (SPLITS, 1) in kernels


CODES = {
    "int8": torch.arange(-127, 129).where(torch.arange(256) < 255, 0).to(torch.int8),
    "fp8": torch.arange(256).where(torch.arange(256) % 128 < 127, 0).to(torch.uint8).view(torch.float8_e4m3fn),
}
CODES |= {name: torch.arange(256).to(torch.uint8) for name in ("int4", "nf4")}  # two codes in each


def every_code(variant: str) -> QuantizedTensor:
    """A weight of 4 or 8 rows and 64 columns in which every byte occurs; scales are powers of two."""
    K = 64
    scheme, options = VARIANTS[variant]
    data = CODES[SCHEMES[scheme][0]]
    data = data.view(-1, K // 2 if data.dtype == torch.uint8 else K)
    weight = quantize_tensor(torch.randn(len(data), K), scheme, **options)
    scales = 2.0 ** (torch.arange(weight.scales.numel()) % 3 - 1.0).view_as(weight.scales)
    zeros = weight.zeros
    if zeros is not None:
        zeros = (torch.arange(zeros.numel()) % 17).to(torch.uint8).view_as(zeros)
    return dataclasses.replace(weight, data=data, scales=scales.to(weight.scales.dtype), zeros=zeros)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "variant",
    ("int8", "int4_32", "int4_zeros", "int4_row", "nf4", "fp8", "fp8_block", "w8a8", "w4a8", "w4a8_zeros", "w4a8_row"),
)
@on_both
def test_every_code_of_every_format(variant, dtype, backend):
    """Rows of the unit matrix pick columns of the weight, and rows of it in the backward: no sum rounds anything."""
    weight = every_code(variant)
    N, K = weight.shape
    size = 127 if weight.activations else 1  # rounded activations have the scale one
    exact = weight.dequantize(torch.float64)
    unit = size * torch.eye(K, dtype=dtype)
    for rows in (1, 8) if dtype == torch.float32 and not weight.activations else (1, 8, 16, 32, 64):
        found = torch.cat([forward(backend, x, weight) for x in unit.split(rows)])
        assert torch.equal(found, (size * exact).to(dtype).t()), rows
    assert torch.equal(backward(backend, torch.eye(N, dtype=dtype), weight), exact.to(dtype))


def moved(tensor: torch.Tensor, bytes_on: int) -> torch.Tensor:
    """The same values, so many bytes behind an aligned address."""
    flat = torch.empty(tensor.numel() * tensor.element_size() + bytes_on, dtype=torch.uint8)
    view = flat[bytes_on:].view(tensor.dtype).view(tensor.shape)
    return view.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", (256, 264, 251))
@pytest.mark.parametrize("variant", ("int4", "int8", "w8a8", "w4a8", "nf4_double", "fp8"))
def test_alignment_does_not_change_a_bit(variant, K, dtype):
    backend, size = "cuda-sim-sm80", dtype.itemsize
    for M in (1, 5):
        inputs = cases.make_inputs(QuantizedLinearCase(variant, M, 35, K, dtype))
        y, dx = forward(backend, inputs.x, inputs.weight, inputs.bias), backward(backend, inputs.dy, inputs.weight)
        for weight_on, x_on in ((1, 0), (4, size), (8, 4), (0, size), (3, size)):
            # Floats lie at whole elements.
            weight = dataclasses.replace(inputs.weight, data=moved(inputs.weight.data, weight_on))
            x, dy, bias = (moved(tensor, x_on) for tensor in (inputs.x, inputs.dy, inputs.bias))
            assert torch.equal(forward(backend, x, weight, bias), y)
            assert torch.equal(backward(backend, dy, weight), dx)


def hard_rows(K: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows whose rounding is hard, scaled so that many quotients are ties or out of range."""
    generator = torch.Generator().manual_seed(3)
    ties = torch.randint(-126, 126, (K,), generator=generator) + 0.5
    ties[0] = 127.0  # the scale is one
    normal = torch.randn(K, generator=generator)
    tiny = torch.finfo(dtype).smallest_normal
    rows = [ties, 8 * ties, ties * tiny / 4, normal, normal * tiny, torch.zeros(K), -torch.zeros(K)]
    rows += [normal.sign() * torch.finfo(dtype).max / 2, normal * 1e-3]
    rows += [torch.zeros(K).index_fill(0, torch.tensor(K - 1), tiny / 2)]
    rows = torch.stack(rows).to(dtype)
    bad = rows[3].repeat(3, 1)
    bad[0, 1], bad[1, K // 2], bad[2, K - 1] = torch.nan, torch.inf, -torch.inf
    return torch.cat((rows, bad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", (24, 37, 4200))
@on_both
def test_activations_are_rounded_as_the_reference_does(K, dtype, backend):
    """The unit matrix as weights leaves the rounded activations times their scale: 24 columns are enough to see."""
    x, picked = hard_rows(K, dtype), torch.arange(24) * (K // 24)
    data = torch.zeros(24, K, dtype=torch.int64)
    data[torch.arange(24), picked] = 1
    values, scales = int8.quantize_rows(x)
    expected = (values[:, picked].float() * scales).to(dtype)
    for unit in (True, False):
        if not unit:
            data = torch.randint(-7, 8, (24, K))
        byte = QuantizedTensor("int8", (24, K), int8.pack(data), torch.ones(24), torch.float32, activations="int8")
        half = dataclasses.replace(byte, format="int4", data=int4.pack(data + 8), scales=torch.ones(24, 1))
        for weight in (byte, half):
            if not unit:
                parts = (weight.data, weight.scales, None, None, None, weight.format, 0, "int8")
                expected = reference.linear_fwd(x, *parts)
            torch.testing.assert_close(forward(backend, x, weight), expected, rtol=0, atol=0, equal_nan=True)


SCHEDULED = [
    QuantizedLinearCase("int4_32", 1, 40, 4500, torch.float32),
    QuantizedLinearCase("int4_128", 1, 40, 640, torch.bfloat16),
    QuantizedLinearCase("int8", 6, 20, 1100, torch.float32),
    QuantizedLinearCase("int8", 6, 50, 2200, torch.float32),  # one block adds three slices of x
    QuantizedLinearCase("int4_zeros", 20, 40, 840, torch.bfloat16),
    QuantizedLinearCase("nf4_double", 40, 40, 650, torch.float16),
    QuantizedLinearCase("w8a8", 20, 140, 650, torch.bfloat16),
    QuantizedLinearCase("w8a8", 70, 40, 333, torch.float32),
    QuantizedLinearCase("w4a8_zeros", 20, 140, 650, torch.bfloat16),
    QuantizedLinearCase("w4a8", 5, 40, 2300, torch.bfloat16, op=cases.OPS[1]),
]


@pytest.mark.parametrize("async_mode", ("eager", "lazy", "random"))
@pytest.mark.parametrize("case", SCHEDULED, ids=str)
@on_both
def test_schedules_do_not_change_a_bit(case, backend, async_mode):
    simulated.assert_same_in_any_schedule(cases, case, backend, async_mode)


def test_what_the_kernels_cannot_do_is_an_error():
    """The raw ops, which nobody has asked whether they refuse."""
    x = torch.randn(65, 64, dtype=torch.bfloat16)
    weight = cases.make_inputs(QuantizedLinearCase("int4", 1, 8, 64, torch.bfloat16)).weight
    with pytest.raises(ValueError, match="x has 65 rows, expected at most 64"):
        forward("cuda-sim-sm80", x, weight)
    with pytest.raises(ValueError, match="x has 9 rows, expected at most 8"):
        forward("cuda-sim-sm80", x[:9].float(), weight)
    with pytest.raises(ValueError, match="group_size is 16, expected 32, 64, 128"):
        kernel("cuda-sim-sm80", "quantized_linear_fwd")(
            x[:1], weight.data, torch.ones(8, 4), None, None, None, "int4", 16, ""
        )
