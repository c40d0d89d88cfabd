"""What is worth timing for quantized_linear and rms_norm_quantized_linear, and the peers to beat."""

import functools
import os

import torch
import torch.nn.functional as torch_functional

from llmkernels.benchmarking import onnx_peer
from llmkernels.ops.quantized_linear import cases
from llmkernels.ops.quantized_linear.cases import QuantizedLinearCase
from llmkernels.quantization import _groups, int4, int8

ROWS = (1, 4, 16, 64, 128, 1024)
SIZE, WIDE = (4096, 4096), (11008, 4096)  # N, K
# By the goals' formats, what `peers` and `forward_peers` have beside torch's linear.
GOALS = ("int8", "int4_128", "w8a8", "w4a8")

# Peers round scales to bf16, or activations in their own way: of outputs of size one.
FORWARD_PEER_TOLERANCE = 0.15


def bench_cases(op: str, full: bool) -> list[QuantizedLinearCase]:
    """The goals' formats and rows of x; with `full` every format, and the wide layer in the goals'.

    Without it not all rows in fp32, and 1024 only where a goal is about them: to check that answer in fp64 takes longer
    than to time it.
    """
    if op == cases.OPS[1]:
        make = functools.partial(QuantizedLinearCase, dtype=torch.bfloat16, bias=False, op=op)
        return [make(variant, M, *SIZE) for variant in GOALS for M in ROWS[:-1]]
    found = []
    for variant in cases.VARIANTS if full else GOALS:
        many = full or variant in ("int8", "w8a8")
        rows = {torch.bfloat16: ROWS if many else ROWS[:-1], torch.float32: ROWS if full else (1, 16, 128)}
        for dtype in rows:
            found += [QuantizedLinearCase(variant, M, *SIZE, dtype, bias=False) for M in rows[dtype]]
            wide = rows[dtype] if full and variant in GOALS else ()
            found += [QuantizedLinearCase(variant, M, *WIDE, dtype, bias=False) for M in wide]
    return found


def small(case: QuantizedLinearCase, elements: int) -> QuantizedLinearCase:
    """A case of `bench_cases` with about so many elements in the weight, for what is counted and not timed.

    Its rows are few and long, so that kernels cut their sums into parts as they do for few rows of x on a large GPU.
    """
    side = max(16, int(elements**0.5))
    return cases.reshaped(case, (min(case.M, side), min(case.N, side // 8), min(case.K, side * 8)))


def overhead_case(op: str) -> QuantizedLinearCase:
    """One short row: the time is that of the call, not of the kernel."""
    return QuantizedLinearCase("int8", 1, 16, 32, bias=False, op=op)


def _once(make):
    """`make(inputs)`, kept for the weight that it was made of, as a model has it."""
    known = {}

    def kept(inputs):
        if id(inputs.weight) not in known:
            known.clear()
            known[id(inputs.weight)] = (inputs.weight, make(inputs))
        return known[id(inputs.weight)][1]

    return kept


def peers(case: QuantizedLinearCase) -> dict:
    """Name -> function of the inputs: torch's linear of the weight before it was quantized, in the dtype of x.

    What it returns is near what `cases.call` returns, which is what the check of peers asks for.
    """
    written_out = _once(lambda inputs: inputs.weight.dequantize(inputs.x.dtype))
    if case.op == cases.OPS[1]:
        norm = lambda inputs: torch_functional.rms_norm(inputs.x, (case.K,), inputs.norm_weight, cases.EPS)
        linear = torch_functional.linear
        return {"torch rms_norm, linear": lambda inputs: (linear(norm(inputs), written_out(inputs), inputs.bias),)}
    return {"torch linear": lambda inputs: (torch_functional.linear(inputs.x, written_out(inputs), inputs.bias),)}


def forward_peers(case: QuantizedLinearCase, device: str) -> dict:
    """As `peers`, without a backward: torch's packed products and ONNX Runtime's, of weights that are packed once.

    torch's are compared in bf16 only: in fp32 they take a hundred times as long.
    """
    if device != "cpu" or case.bias or case.op == cases.OPS[1]:
        return {}
    found = {}
    if case.variant == "int8" and case.dtype == torch.bfloat16:
        scales = _once(lambda inputs: inputs.weight.scales.to(inputs.x.dtype))
        found["torch int8pack"] = lambda inputs: (
            torch._weight_int8pack_mm(inputs.x, inputs.weight.data, scales(inputs)),
        )
    if case.variant == "int4_128" and case.dtype == torch.bfloat16:
        found["torch int4pack"] = _int4pack()
    if case.variant == "w8a8":
        found["torch int_mm"] = _int_mm
    bits = {"int8": 8, "w8a8": 8, "int4_128": 4, "w4a8": 4}.get(case.variant)
    held = "ATEN_CPU_CAPABILITY" in os.environ  # what torch is held to, ONNX Runtime cannot be
    if bits is not None and onnx_peer.AVAILABLE and not held and case.dtype == torch.float32 and case.K % 128 == 0:
        found["ONNX Runtime"] = _onnx(case, bits, rounded=case.variant.startswith("w"))
    return found


def _int4pack():
    def pack(inputs):
        weight = inputs.weight
        codes = int4.unpack(weight.data, weight.shape[1]).int()
        scales = weight.scales.to(inputs.x.dtype).t()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed, torch.stack((scales, torch.zeros_like(scales)), 2).contiguous()

    packed = _once(pack)

    def run(inputs):
        data, scales = packed(inputs)
        return (torch.ops.aten._weight_int4pack_mm_for_cpu(inputs.x, data, inputs.weight.group_size, scales),)

    return run


def _int_mm(inputs):
    """Rows rounded by torch's own functions, multiplied as integers."""
    values, scales = int8.quantize_rows(inputs.x)
    sums = torch._int_mm(values, inputs.weight.data.t())
    return ((sums.float() * (scales * inputs.weight.scales)).to(inputs.x.dtype),)


def _onnx(case: QuantizedLinearCase, bits: int, rounded: bool):
    """MatMulNBits, whose weight is unsigned, in blocks of columns; `rounded`: with int8 activations."""

    def prepare(inputs):
        weight = inputs.weight
        block = weight.group_size or 128
        data = weight.data if bits == 4 else (weight.data.int() + 128).to(torch.uint8)
        blocks = _groups.count(case.K, block)
        scales = weight.scales.float().view(case.N, -1).expand(case.N, blocks)
        constants = (data.reshape(case.N, blocks, block * bits // 8), scales.contiguous().flatten())
        return onnx_peer.operator(
            "MatMulNBits", (inputs.x,), ("y",), domain="com.microsoft", constants=constants, K=case.K, N=case.N,
            bits=bits, block_size=block, accuracy_level=4 if rounded else 1,
        )  # fmt: skip

    prepared = _once(prepare)
    return lambda inputs: prepared(inputs)(inputs.x)
