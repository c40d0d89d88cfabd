"""What is worth timing for quantized_linear, and the peers to beat."""

import torch
import torch.nn.functional as torch_functional

from llmkernels.ops.quantized_linear import cases
from llmkernels.ops.quantized_linear.cases import QuantizedLinearCase

ROWS = (1, 4, 16, 64, 128, 1024)
SIZE, WIDE = (4096, 4096), (11008, 4096)  # N, K


def bench_cases(op: str, full: bool) -> list[QuantizedLinearCase]:
    """The goals' sizes in bf16 and fp32; with `full` also the wide layer and every format."""
    variants = list(cases.VARIANTS) if full else ["int8", "int4_128", "w8a8", "w4a8"]
    found = []
    for variant in variants:
        for dtype in (torch.bfloat16, torch.float32):
            found += [QuantizedLinearCase(variant, M, *SIZE, dtype, bias=False) for M in ROWS]
            found += [QuantizedLinearCase(variant, M, *WIDE, dtype, bias=False) for M in (1, 128) if full]
    return found


def small(case: QuantizedLinearCase, elements: int) -> QuantizedLinearCase:
    """A case of `bench_cases` with about so many elements in the weight, for what is counted and not timed.

    Its rows are few and long, so that kernels cut their sums into parts as they do for few rows of x on a large GPU.
    """
    side = max(16, int(elements**0.5))
    return cases.reshaped(case, (min(case.M, side), min(case.N, side // 8), min(case.K, side * 8)))


def overhead_case(op: str) -> QuantizedLinearCase:
    """One short row: the time is that of the call, not of the kernel."""
    return QuantizedLinearCase("int8", 1, 16, 32, bias=False)


def peers(case: QuantizedLinearCase) -> dict:
    """Name -> function of the inputs: torch's linear of the weight before it was quantized, in the dtype of x.

    What it returns is near what `cases.call` returns, which is what the check of peers asks for.
    """
    known = {}

    def written_out(inputs):
        """Once for each weight, as a model has it."""
        if id(inputs.weight) not in known:
            known[id(inputs.weight)] = (inputs.weight, inputs.weight.dequantize(inputs.x.dtype))
        return known[id(inputs.weight)][1]

    return {"torch linear": lambda inputs: (torch_functional.linear(inputs.x, written_out(inputs), inputs.bias),)}


def forward_peers(case: QuantizedLinearCase, device: str) -> dict:
    """As `peers`, without a backward: none yet."""
    return {}
