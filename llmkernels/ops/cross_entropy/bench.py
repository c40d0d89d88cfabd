"""What is worth timing of cross entropy, and the peers to beat."""

import torch
import torch.nn.functional as torch_functional

from llmkernels.ops.cross_entropy import cases
from llmkernels.ops.cross_entropy.cases import CrossEntropyCase
from llmkernels.testing.inputs import fewer

SIZE, LAYER = (4096, 32000), (8192, 32000)  # the goals' sizes
HIDDEN = 512


def bench_cases(op: str, full: bool) -> list[CrossEntropyCase]:
    """Cases of `op`: the goals' size, and with `full` options and a larger vocabulary."""
    dtypes = (torch.float32, torch.bfloat16)
    if op == "linear_cross_entropy":
        return [CrossEntropyCase(op, LAYER, dtype, hidden=HIDDEN) for dtype in dtypes]
    found = [CrossEntropyCase(op, SIZE, dtype) for dtype in dtypes]
    if full:
        found += [CrossEntropyCase(op, (1024, 131_072), dtype) for dtype in dtypes]
        found += [CrossEntropyCase(op, SIZE, dtype, label_smoothing=0.1) for dtype in dtypes]
        found += [CrossEntropyCase(op, SIZE, dtype, softcap=30.0, z_loss=1e-4) for dtype in dtypes]
    return found


def small(case: CrossEntropyCase, elements: int) -> CrossEntropyCase:
    """A case of `bench_cases` with about so many elements in each tensor, for what is counted and not timed."""
    return cases.reshaped(case, fewer(case.shape, elements))


def overhead_case(op: str) -> CrossEntropyCase:
    """One short row: the time is that of the call, not of the kernel."""
    return CrossEntropyCase(op, (1, 256), hidden=64 if op == "linear_cross_entropy" else 0)


def peers(case: CrossEntropyCase) -> dict:
    """Name -> function of the inputs; each must return what `cases.call` returns."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda inputs: cases.call_torch(case, inputs))
    found = {"torch eager": lambda inputs: cases.call_torch(case, inputs), "torch.compile": compiled}
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if case.hidden and options is not None:
        found["torch fused"] = lambda inputs: (
            torch_functional.linear_cross_entropy(inputs.input, inputs.linear_weight, inputs.target, options=options()),
        )
    return found


def forward_peers(case: CrossEntropyCase, device: str) -> dict:
    """As `peers`, without a backward: none."""
    return {}
