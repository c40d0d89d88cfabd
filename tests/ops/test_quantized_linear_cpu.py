"""What is particular to quantized_linear on the CPU: instruction sets, threads, memory behind tensors, rare codes."""

import ctypes
import functools
import mmap
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

import llmkernels
from llmkernels import _native, functional
from llmkernels.ops.quantized_linear import cases, reference
from llmkernels.ops.quantized_linear.cases import VARIANTS, QuantizedLinearCase
from llmkernels.quantization import _groups, int4, int8
from llmkernels.quantization.tensor import quantize_tensor
from llmkernels.testing.battery import evaluate, failures, judge
from llmkernels.testing.inputs import short_name
from tests.support import assert_same_with_any_threads

pytestmark = pytest.mark.skipif(_native.why_absent("cpu") is not None, reason=f"cpu: {_native.why_absent('cpu')}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Where another kernel begins: of one, a few, some rows, of a second task of rows, forward and backward.
ROWS = (1, 2, 4, 5, 8, 9, 14, 257, 513)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_instruction_set(variant, isa, poison):
    for dtype in DTYPES:
        for M, N, K in ((1, 9, 70), (2, 4, 1), (3, 70, 129), (7, 66, 256), (13, 65, 333)):
            case = QuantizedLinearCase(variant, M, N, K, dtype)
            assert failures(judge(cases, case, "cpu")) == [], case


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("variant", ("int8", "int4_zeros", "w8a8", "w4a8_zeros", "fp8_dynamic_block"))
def test_number_of_rows(variant, M, poison):
    """Several parts of the columns and several tasks too."""
    for dtype in DTYPES[:2]:
        case = QuantizedLinearCase(variant, M, 70, 2200, dtype)
        assert failures(judge(cases, case, "cpu")) == [], case


@pytest.mark.parametrize("M", (1, 8, 40))
@pytest.mark.parametrize("K", (5, 64, 333, 4500))
def test_integers_are_those_of_the_definition(M, K, isa):
    """Sums of bytes are exact and scaled in the same order, so every bit is that of plain PyTorch."""
    case = QuantizedLinearCase("w8a8", M, 70, K)
    inputs = cases.make_inputs(case)
    (y,) = cases.call(case, inputs, "cpu")
    parts = (inputs.weight.data, inputs.weight.scales, None, None)
    assert torch.equal(y, reference.linear_fwd(inputs.x, *parts, inputs.bias, "int8", 0, "int8"))


def test_the_quantized_lstm_has_the_same_products(isa):
    weight = quantize_tensor(torch.randn(40, 130), "int8")
    for dtype in (torch.float64, *DTYPES):
        for bias in (None, torch.randn(40).to(dtype)):
            x = torch.randn(7, 130).to(dtype)
            native = int8.linear(x, weight, bias)
            with llmkernels.use_backend("torch"):
                assert torch.equal(int8.linear(x, weight, bias, integers=weight.data.float()), native)
            assert native.dtype == torch.float32


def test_bytes_of_any_value(isa):
    """-128 is never written, but a weight may come from elsewhere; sums of the largest products do not saturate."""
    K = 640
    codes = torch.randint(-128, 128, (16, K), dtype=torch.int8)
    codes[0], codes[1] = 127, -128
    weight = replace(quantize_tensor(torch.ones(16, K), "w8a8"), data=codes, scales=torch.ones(16))
    x = torch.randint(-127, 128, (3, K)).float()
    x[0], x[1] = 127.0, -127.0
    x[2, 0] = 127.0
    exact = (x.double() @ codes.double().t()).float()
    for rows in (x, x.repeat(5, 1)):
        y = functional.quantized_linear(rows, weight, backend="cpu")
        assert torch.equal(y, exact.repeat(len(rows) // 3, 1))


@pytest.mark.parametrize("activations", (None, "int8"))
def test_zero_points_of_every_value(activations, isa):
    """0 ... 16, with every code."""
    codes = torch.arange(16).repeat(17, 8)
    zeros = torch.arange(17, dtype=torch.uint8)[:, None].repeat(1, 2)
    scheme = "w4a8" if activations else "int4"
    weight = quantize_tensor(torch.ones(17, 128), scheme, symmetric=False, scale_dtype=torch.float32)
    weight = replace(weight, data=int4.pack(codes), zeros=zeros, scales=torch.full_like(weight.scales, 0.5))
    x = torch.randint(-2, 3, (20, 128))
    x[:, 7] = 127
    exact = 0.5 * (x @ (codes - zeros[:, :1].long()).t())
    dy = torch.randint(-2, 3, (20, 17))
    for dtype in (torch.float32, torch.bfloat16):
        for M in (1, 20):
            leaf = x[:M].to(dtype).requires_grad_()
            y = functional.quantized_linear(leaf, weight, backend="cpu")
            assert torch.equal(y, exact[:M].to(dtype))
            (dx,) = torch.autograd.grad(y, leaf, dy[:M].to(dtype))
            assert torch.equal(dx, (0.5 * (dy[:M] @ (codes - zeros[:, :1].long()))).to(dtype))


@pytest.mark.parametrize("M", (1, 20))
def test_fp8_of_every_value(M, isa):
    """All 256 bytes, denormals and NaN among them."""
    data = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 3).view(torch.float8_e4m3fn)
    weight = replace(quantize_tensor(torch.ones(256, 3), "fp8"), data=data, scales=torch.ones(256))
    x = torch.zeros(M, 3)
    x[:, 1] = 1.0
    for dtype in (torch.float32, torch.bfloat16):
        y = functional.quantized_linear(x.to(dtype), weight, backend="cpu")
        expected = data[:, 1].to(dtype).expand(M, 256)
        assert torch.equal(y.isnan(), expected.isnan()) and expected.isnan().any()
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("variant", ("int8", "int4_32", "nf4_double", "w8a8", "w4a8", "fp8_dynamic"))
def test_same_bits_with_any_number_of_threads(variant, dtype):
    for M in (1, 7, 40, 600):
        case = QuantizedLinearCase(variant, M, 330, 700, dtype)
        inputs = cases.make_inputs(case)
        assert_same_with_any_threads(functools.partial(evaluate, cases, case, inputs, "cpu"))


def test_rows_do_not_depend_on_each_other():
    """A row's result is that of the same row among others as many."""
    for variant in ("int8", "int4", "w4a8", "nf4"):
        case = QuantizedLinearCase(variant, 24, 200, 300, torch.bfloat16)
        inputs = cases.make_inputs(case)
        (y,) = cases.call(case, inputs, "cpu")
        order = torch.randperm(24)
        (again,) = cases.call(case, inputs.replace(x=inputs.x[order]), "cpu")
        assert torch.equal(again, y[order]), variant


def forced(isa, function):
    module = _native.module("cpu")
    if isa not in module.available_isas():
        pytest.skip(f"cpu: {isa} does not run on this machine")
    before = module.isa()
    try:
        module.force_isa(isa)
        return function()
    finally:
        module.force_isa(before)


@pytest.mark.parametrize(
    "sizes", ((9, 1, 1), (15, 17, 33), (16, 64, 2050), (17, 65, 127), (33, 129, 128), (70, 31, 513))
)
@pytest.mark.parametrize("variant", ("int8", "int4", "nf4_double", "fp8_block", "fp8_dynamic"))
def test_emulated_tiles(variant, sizes, poison):
    """Sizes about those of tiles; bitwise the same on any number of threads."""
    case = QuantizedLinearCase(variant, *sizes, torch.bfloat16)
    inputs = cases.make_inputs(case)
    assert forced("amx_emulated", lambda: failures(judge(cases, case, "cpu"))) == []
    run = functools.partial(evaluate, cases, case, inputs, "cpu")
    forced("amx_emulated", lambda: assert_same_with_any_threads(run))


def test_emulated_tiles_are_used():
    """The order of sums is that of the instructions, so results differ from those of vectors in some last digit."""
    case = QuantizedLinearCase("fp8_dynamic", 40, 130, 700)  # sums are not rounded to bf16
    inputs = cases.make_inputs(case)
    (tiles,), (vectors,) = (
        forced(isa, lambda: cases.call(case, inputs, "cpu")) for isa in ("amx_emulated", "avx512_bf16")
    )
    assert not torch.equal(tiles, vectors)


class Guarded:
    """Memory whose last byte is followed by a page that must not be read."""

    def __init__(self, tensor: torch.Tensor):
        page = mmap.PAGESIZE
        size = tensor.nbytes
        pages = -(-size // page)
        self.memory = mmap.mmap(-1, (pages + 1) * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(base + pages * page), page, 0) == 0
        self.tensor = torch.frombuffer(self.memory, dtype=torch.uint8, count=size, offset=pages * page - size)
        self.tensor.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        self.tensor = self.tensor.view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_behind_the_tensors_is_read(variant, isa):
    """Every tensor of a call ends where a page ends, and the next one would end the process."""
    kept = []

    def guarded(tensor):
        kept.append(Guarded(tensor))
        return kept[-1].tensor

    for dtype in (torch.float32, torch.bfloat16):
        for M, N, K in ((1, 3, 1), (2, 5, 31), (3, 6, 129), (4, 1, 95), (9, 7, 33), (20, 65, 127)):
            case = QuantizedLinearCase(variant, M, N, K, dtype)
            inputs = cases.make_inputs(case)
            parts = {name: guarded(part) for name, part in inputs.weight.parts.items()}
            own = inputs.replace(
                x=guarded(inputs.x), bias=guarded(inputs.bias), dy=guarded(inputs.dy),
                weight=replace(inputs.weight, **parts),
            )  # fmt: skip
            plain, protected = evaluate(cases, case, inputs, "cpu"), evaluate(cases, case, own, "cpu")
            assert all(torch.equal(plain[name], protected[name]) for name in plain), case


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump: not installed")
def test_instructions_are_those_of_the_variant():
    """Products of bytes and of bf16 are where the processor was asked for them, and nowhere else."""
    if "AVX512_VNNI" not in _native.module("cpu").build_info()["isas"].split(","):
        pytest.skip("cpu: built for another processor")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", _native.module("cpu").__file__]
    found, function = {"vpdpbusd": set(), "vdpbf16ps": set()}, ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if line.endswith(">:"):
            function = line.split(" ", 1)[1]
        for instruction, where in found.items():
            if f"\t{instruction}" in line:
                where.update(re.findall(r"llmkernels::cpu::([A-Z0-9_]+)::", function)[:1])
    assert {"AVX512_VNNI", "AVX512_BF16"} <= found["vpdpbusd"] <= {"AVX512_VNNI", "AVX512_BF16", "AMX", "AMX_EMULATED"}
    assert {"AVX512_BF16"} <= found["vdpbf16ps"] <= {"AVX512_BF16", "AMX", "AMX_EMULATED"}


def test_raw_op_refuses_groups_that_kernels_do_not_have():
    weight = quantize_tensor(torch.randn(4, 96), "int4", group_size=32)
    wide = weight.scales.repeat_interleave(2, 1)[:, :6]
    with pytest.raises(ValueError, match=r"group_size is 16, expected 0 \(the whole row\), 32, 64 or 128"):
        torch.ops.llmkernels_cpu.quantized_linear_fwd(
            torch.randn(2, 96), weight.data, wide.contiguous(), None, None, None, "int4", 16, ""
        )


def test_fp64_is_refused_with_a_reason():
    weight = quantize_tensor(torch.randn(4, 32), "int8")
    with pytest.raises(Exception, match="cpu: float64 needs plain PyTorch"):
        functional.quantized_linear(torch.randn(2, 32, dtype=torch.float64), weight, backend="cpu")


def test_groups_of_a_row_that_ends_in_one():
    """The scales of a row's last groups where the last block has fewer columns than groups have room for."""
    for group_size in (32, 64, 128):
        for K in (33, 65, 97, 129, 160, 161, 257):
            weight = quantize_tensor(torch.randn(5, K), "int4", group_size=group_size, scale_dtype=torch.float32)
            assert weight.scales.shape[1] == _groups.count(K, group_size)
            x = torch.randn(3, K)
            y = functional.quantized_linear(x, weight, backend="cpu")
            torch.testing.assert_close(y, x @ weight.dequantize(torch.float32).t(), rtol=1e-5, atol=1e-5)
