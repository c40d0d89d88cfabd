"""What is worth timing in the norm family, and the peers to beat."""

import torch

from llmkernels.ops.norm import cases
from llmkernels.ops.norm.cases import NormCase

SIZE, ROW = (4096, 1024), (1024,)
LONG = ((256, 16384), (8192, 256), (64, 262144))


def bench_cases(op: str, full: bool) -> list[NormCase]:
    """Cases of `op`: the goals' size, and with `full` long, short and very long rows."""
    shapes = (SIZE, *LONG) if full else (SIZE,)
    return [NormCase(op, shape, shape[-1:], dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]


def overhead_case(op: str) -> NormCase:
    """One short row: the time is that of the call, not of the kernel."""
    return NormCase(op, (1, 256), (256,))


def peers(case: NormCase) -> dict:
    """Name -> function of the inputs; each must return what `cases.call` returns."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda inputs: cases.call_torch(case, inputs))
    return {"torch eager": lambda inputs: cases.call_torch(case, inputs), "torch.compile": compiled}
