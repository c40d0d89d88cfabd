"""quantized_linear in Triton: what its launchers choose by size, made small; rounding and decoding bit by bit."""

from types import SimpleNamespace

import pytest
import torch

from llmkernels import functional
from llmkernels.ops.quantized_linear import cases
from llmkernels.ops.quantized_linear.cases import QuantizedLinearCase
from llmkernels.quantization import fp8, int8
from llmkernels.quantization.tensor import QuantizedTensor
from llmkernels.testing.battery import failures, judge
from llmkernels.testing.inputs import short_name
from tests.conftest import absent, device_of

pytestmark = pytest.mark.skipif(absent("triton") is not None, reason=f"triton: {absent('triton')}")

PARTED = ("int8", "int4_zeros", "int4_128", "nf4_double", "fp8_block", "w8a8", "w4a8", "w4a8_row", "fp8_dynamic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def triton_kernels():
    from llmkernels.ops.quantized_linear import triton_kernels

    return triton_kernels


@pytest.mark.parametrize("M", (3, 70))
@pytest.mark.parametrize("variant", PARTED)
def test_sums_in_parts(variant, M, triton_kernels, monkeypatch):
    monkeypatch.setattr(triton_kernels, "PART_LENGTH", 64)
    for dtype in (torch.float32, torch.bfloat16):
        case = QuantizedLinearCase(variant, M, 150, 296, dtype)
        assert failures(judge(cases, case, "triton", device_of("triton"))) == []


def test_number_of_parts(triton_kernels):
    """What is left over goes to the last part, and no part is empty."""
    for tiles in (1, 5, 40, 300):
        for length in (0, 1, 511, 1024, 1025, 4096, 4097, 11008):
            for block, whole in ((32, 0), (32, 128), (64, 64), (128, 0)):
                count, blocks = triton_kernels.parts(tiles, length, block, whole)
                assert count >= 1 and (count - 1) * blocks * block < max(length, 1) <= count * blocks * block
                assert whole == 0 or blocks * block % whole == 0
                assert count == 1 or count * tiles <= triton_kernels.PROGRAMS


def test_more_blocks_of_rows_than_pass_together():
    case = QuantizedLinearCase("int8", 1100, 150, 40, torch.bfloat16)
    assert failures(judge(cases, case, "triton", device_of("triton"))) == []


@pytest.mark.parametrize("variant", ("int8", "int4_zeros", "int4_32", "nf4_double", "fp8_block"))
def test_wide_tiles(variant, triton_kernels, monkeypatch):
    monkeypatch.setattr(triton_kernels, "takes_wide_tiles", lambda x, N: x.dtype != torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        case = QuantizedLinearCase(variant, 300, 150, 200, dtype)
        assert failures(judge(cases, case, "triton", device_of("triton"))) == []


@pytest.mark.parametrize("K", (1, 100, 5000))
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_activations_are_rounded_as_the_reference_does(dtype, K, triton_kernels):
    """Bit by bit: ties, subnormal numbers, a row of zeros, rows that are not finite, rows longer than a block."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, K, generator=generator, dtype=torch.float64)
    x[1] = 0.0
    x[2] = torch.arange(K) % 255 / 2.0  # of int8, with a scale of one: ties
    x[2, 0] = 127.0
    x[3] = 448.0 * 0.5 ** (torch.arange(K) % 21) * (1.0 + torch.arange(K) % 17 / 16.0)  # of fp8: ties, and below 2^-6
    x[3].clamp_(max=448.0)[0] = 448.0
    x[4] *= {torch.float32: 1e-38, torch.bfloat16: 1e-30, torch.float16: 1e-6}[dtype]  # the interpreter's bf16 has none
    x[5, K // 2], x[6, 0], x[7, -1] = float("nan"), float("inf"), -float("inf")
    x = x.to(dtype)
    on_device = x.to(device_of("triton"))
    finite = [0, 1, 2, 3, 4, 8]
    for module, name, types in ((int8, "int8", (torch.int8,)), (fp8, "fp8", (torch.uint8, torch.float16))):
        known, known_scales = module.quantize_rows(x)
        for to in types:
            values, scales = (part.cpu() for part in triton_kernels._rounded(on_device, K, name, to, None))
            torch.testing.assert_close(scales, known_scales.flatten(), rtol=0, atol=0, equal_nan=True)
            values = values.view(torch.float8_e4m3fn) if to == torch.uint8 else values
            assert torch.equal(values[finite].float(), known[finite].float())


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_every_code_of_fp8(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    codes[codes & 0x7F == 0x7F] = 0  # NaN, which is never written
    data, device = codes.view(torch.float8_e4m3fn), device_of("triton")
    weight = QuantizedTensor("fp8", (4, 64), data.to(device), torch.ones(4, device=device))
    x = torch.eye(64, dtype=dtype, device=device).requires_grad_()
    y = functional.quantized_linear(x, weight, backend="triton")
    assert torch.equal(y.cpu(), data.to(dtype).t())
    dy = torch.zeros(64, 4, dtype=dtype, device=device)
    dy[:4] = torch.eye(4)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx[:4].cpu(), data.to(dtype)) and not dx[4:].any()


def test_what_the_kernels_do_not_know_is_refused():
    device = device_of("triton")
    x, data = torch.ones(2, 64, device=device), torch.zeros(3, 32, dtype=torch.uint8, device=device)
    scales = torch.ones(3, 2, device=device)
    call = torch.ops.llmkernels_triton.quantized_linear_fwd
    with pytest.raises(ValueError, match="format is 'int3', expected one of int8, fp8, int4, nf4"):
        call(x, data, scales, None, None, None, "int3", 32, "")
    with pytest.raises(ValueError, match="group_size is 48, expected one of 0, 32, 64, 128"):
        call(x, data, scales, None, None, None, "int4", 48, "")
    with pytest.raises(ValueError, match="activations is 'fp8' with format 'int4', expected a pair of"):
        call(x, data, scales, None, None, None, "int4", 32, "fp8")


def test_wide_tiles_are_taken_on_hopper_for_many_rows(triton_kernels, monkeypatch):
    def takes(M, N, itemsize=2, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        x = SimpleNamespace(is_cuda=True, element_size=lambda: itemsize, shape=(M, 64), device=None)
        return triton_kernels.takes_wide_tiles(x, N)

    assert takes(1024, 4352) and takes(4096, 4096) and takes(129, 128 * 132)
    assert not takes(1024, 4096)  # 128 tiles
    assert not takes(1, 32000) and not takes(128, 32000)
    assert not takes(4096, 4096, itemsize=4) and not takes(4096, 4096, capability=(10, 0))
