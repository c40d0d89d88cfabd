"""What is worth timing in rope, and the peers to beat."""

import torch

from llmkernels.ops.rope import cases
from llmkernels.ops.rope.cases import RopeCase
from llmkernels.testing.inputs import fewer

SIZE, KV_HEADS = (1, 32, 2048, 128), 8  # a layer of LLaMA-3 8B


def bench_cases(op: str, full: bool) -> list[RopeCase]:
    """Cases of `op`: a prefill, and with `full` the other layouts and dtypes of the tables, and a step of decoding."""
    found = [RopeCase(op, SIZE, dtype, KV_HEADS) for dtype in (torch.float32, torch.bfloat16)]
    if full:
        seq_first = (SIZE[0], SIZE[2], SIZE[1], SIZE[3])
        for dtype in (torch.float32, torch.bfloat16):
            found.append(RopeCase(op, SIZE, dtype, KV_HEADS, interleaved=True))
            found.append(RopeCase(op, seq_first, dtype, KV_HEADS, seq_dim=-3))
        found.append(RopeCase(op, SIZE, torch.bfloat16, KV_HEADS, table="fp32"))
        found.append(RopeCase(op, (16, 32, 1, 128), torch.bfloat16, KV_HEADS, positions="2d"))
    return found


def small(case: RopeCase, elements: int) -> RopeCase:
    """A case of `bench_cases` with about so many elements in each tensor, for what is counted and not timed."""
    return cases.reshaped(case, fewer(case.shape, elements, case.seq_dim))


def overhead_case(op: str) -> RopeCase:
    """One token: the time is that of the call, not of the kernel."""
    return RopeCase(op, (1, 4, 1, 64), kv_heads=1)


def peers(case: RopeCase) -> dict:
    """Name -> function of the inputs; each must return what `cases.call` returns.

    The usual code has cos and sin with as many columns as it turns, made once for a whole model: so are these.
    """
    torch._dynamo.reset()
    inputs = cases.make_inputs(case, seed=1)
    if case.positions:
        usual = lambda inputs: cases.call_torch(case, inputs)
    else:
        cos, sin = (cases.rows_of(case, table, None).to(case.dtype) for table in (inputs.cos, inputs.sin))

        def usual(inputs):
            return tuple(cases.rotate_usual(x, cos, sin, case.interleaved) for x in (inputs.q, inputs.k))

    return {"torch eager": usual, "torch.compile": torch.compile(usual)}


def forward_peers(case: RopeCase, device: str) -> dict:
    """As `peers`, without a backward: none."""
    return {}
