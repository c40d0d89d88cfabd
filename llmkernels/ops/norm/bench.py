"""What is worth timing in the norm family, and the peers to beat."""

from dataclasses import replace

import torch
import torch.nn.functional as torch_functional

from llmkernels.benchmarking import onnx_peer
from llmkernels.ops.norm import cases
from llmkernels.ops.norm.cases import NormCase
from llmkernels.testing.inputs import fewer

SIZE, ROW = (4096, 1024), (1024,)
LONG = ((256, 16384), (8192, 256), (64, 262144))


def bench_cases(op: str, full: bool) -> list[NormCase]:
    """Cases of `op`: the goals' size, and with `full` long, short and very long rows."""
    shapes = (SIZE, *LONG) if full else (SIZE,)
    return [NormCase(op, shape, shape[-1:], dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]


def small(case: NormCase, elements: int) -> NormCase:
    """A case of `bench_cases` with about so many elements in each tensor, for what is counted and not timed."""
    return cases.reshaped(case, fewer(case.shape, elements))


def overhead_case(op: str) -> NormCase:
    """One short row: the time is that of the call, not of the kernel."""
    return NormCase(op, (1, 256), (256,))


def without_chance(case: NormCase) -> NormCase:
    """The case by which peers are checked: their dropout draws other bits than ours."""
    return replace(case, dropout=0.0) if case.drops else case


def peers(case: NormCase) -> dict:
    """Name -> function of the inputs; each must return what `cases.call` returns."""
    torch._dynamo.reset()

    def run(inputs):
        if not case.drops:
            return cases.call_torch(case, inputs)
        return cases.norm_torch(case, inputs, torch_functional.dropout(inputs.x, case.dropout) + inputs.residual)

    return {"torch eager": run, "torch.compile": torch.compile(run)}


def forward_peers(case: NormCase, device: str) -> dict:
    """As `peers`, without a backward: ONNX Runtime's fused operators, where it is installed."""
    if not onnx_peer.AVAILABLE or case.drops or device != "cpu" or case.dtype != torch.float32:
        return {}
    inputs = cases.make_inputs(case)
    kind = "LayerNormalization" if case.is_layer_norm else "SimplifiedLayerNormalization"

    def tensors(inputs):
        given = (inputs.x, inputs.residual, inputs.weight, inputs.bias)
        return tuple(tensor for tensor in given if tensor is not None)

    if case.adds:
        outputs, settings = ("y", "", "", "new_residual"), {"domain": "com.microsoft"}
        run = onnx_peer.operator(f"Skip{kind}", tensors(inputs), outputs, epsilon=case.eps, **settings)
    else:
        run = onnx_peer.operator(kind, tensors(inputs), ("y",), axis=-1, epsilon=case.eps)
    return {"ONNX Runtime": lambda inputs: run(*tensors(inputs))}
