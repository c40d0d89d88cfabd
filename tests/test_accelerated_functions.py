"""`with accelerated():`: torch's functions by ours, where a kernel takes the call, and as ever where none does."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmkernels
from llmkernels import _native
from llmkernels.accelerate import functional_mode

BEST = "cpu" if _native.why_absent("cpu") is None else "torch"
ROWS = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
WEIGHT, BIAS = torch.linspace(0.5, 2.0, 24), torch.linspace(-1.0, 1.0, 24)
HEADS = torch.randn(3, 2, 4, 7, 16, generator=torch.Generator().manual_seed(1))
LOGITS = torch.randn(6, 11, generator=torch.Generator().manual_seed(2))
TARGET = torch.tensor([0, 3, 10, -100, 2, 2])
MASK = torch.rand(7, 7, generator=torch.Generator().manual_seed(3)) > 0.3

CALLS = {
    "layer_norm": lambda x: F.layer_norm(x, (24,), WEIGHT, BIAS),
    "layer_norm, keywords": lambda x: F.layer_norm(input=x, normalized_shape=[24], eps=1e-3),
    "torch.layer_norm": lambda x: torch.layer_norm(x, (24,), WEIGHT, BIAS),
    "rms_norm": lambda x: F.rms_norm(x, (24,), WEIGHT, 1e-6),
    "torch.rms_norm": lambda x: torch.rms_norm(x, (24,)),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(*(HEADS + x.mean()), is_causal=True),
    "scaled_dot_product_attention, a mask": lambda x: F.scaled_dot_product_attention(*(HEADS + x.mean()), MASK),
    "cross_entropy": lambda x: F.cross_entropy(LOGITS * x.mean(), TARGET, label_smoothing=0.1),
    "cross_entropy, weights": lambda x: F.cross_entropy(LOGITS * x.mean(), TARGET, torch.rand(11) + 1, reduction="sum"),
}


def op_of(name):
    return name.split(",")[0].removeprefix("torch.")


def run(name, x=ROWS):
    """The result, and the gradient of the input."""
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    y = CALLS[name](x)
    return y.detach(), torch.autograd.grad(y.sin().sum(), x)[0]


@pytest.mark.parametrize("name", CALLS)
def test_runs_by_ours_and_agrees(name):
    expected = run(name)
    with llmkernels.accelerated(backend=BEST) as calls:
        found = run(name)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert dict(calls) == {f"{op_of(name)} on {BEST}": 1}
    assert all(map(torch.equal, run(name), expected)), "as before, after"


def _nested():
    return torch.nested.nested_tensor([torch.randn(2, 24), torch.randn(3, 24)], layout=torch.jagged)


AS_EVER = {
    "another function": lambda: F.softmax(ROWS, -1),
    "nested": lambda: F.layer_norm(_nested(), (24,), WEIGHT, BIAS),
    "old arguments": lambda: F.cross_entropy(LOGITS, TARGET, size_average=False),
    "probabilities of another type": lambda: F.cross_entropy(LOGITS.bfloat16(), LOGITS.softmax(-1)),
    "weights of another type": lambda: F.rms_norm(ROWS, (24,), WEIGHT.bfloat16(), 1e-6),
}


@pytest.mark.parametrize("name", AS_EVER)
def test_other_calls_run_as_ever(name):
    try:
        torch.manual_seed(0)
        expected = AS_EVER[name]()
    except RuntimeError as error:
        expected = type(error)
    with llmkernels.accelerated(backend=BEST) as calls:
        if isinstance(expected, type):
            with pytest.raises(expected):
                AS_EVER[name]()
        else:
            torch.manual_seed(0)
            found = AS_EVER[name]()
            assert found.dtype == expected.dtype and torch.equal(
                *(x.values() if x.is_nested else x for x in (found, expected))
            )
    assert set(calls) <= {"layer_norm as ever", "cross_entropy as ever", "rms_norm as ever"}


def test_without_a_kernel_torchs_own_runs(monkeypatch):
    """Our plain PyTorch is not put in the place of torch's kernels."""
    monkeypatch.setattr("llmkernels._native.why_absent", lambda name: "not built (no compiler)")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with llmkernels.accelerated() as calls:
        F.layer_norm(ROWS, (24,))
    assert dict(calls) == {"layer_norm as ever": 1}


def test_fp64_attention_runs_as_ever_and_a_forced_backend_refuses_quietly():
    q, k, v = HEADS.double()
    expected = F.scaled_dot_product_attention(q, k, v)
    for backend in (None, "cuda"):
        with llmkernels.accelerated(backend=backend) as calls:
            assert torch.equal(F.scaled_dot_product_attention(q, k, v), expected)
        assert dict(calls) == {"scaled_dot_product_attention as ever": 1}


class Untouched(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.LayerNorm(24), nn.RMSNorm(24)

    def forward(self, x):
        h = self.norm(x).view(3, 5, 2, 12).transpose(1, 2)
        h = F.scaled_dot_product_attention(h, h, h, is_causal=True)
        return self.last(x + h.transpose(1, 2).flatten(2))


OPS = ("layer_norm_fwd", "attention_fwd", "rms_norm_fwd")


def _targets(graph):
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("where", ("around", "inside"))
def test_compiled(where):
    model, graphs = Untouched(), []
    expected = model(ROWS).detach()

    def inside(x):
        with functional_mode.FunctionalMode(BEST):
            return model(x)

    def backend(graph, _):
        graphs.append(_targets(graph.graph))
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model if where == "around" else inside, fullgraph=True, backend=backend)
        with llmkernels.accelerated(backend=BEST):
            found = compiled(ROWS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if BEST == "cpu":
        assert {f"llmkernels_cpu.{op}.default" for op in OPS} <= graphs[0], graphs[0]


def test_exported():
    model = Untouched()
    expected = model(ROWS)
    with llmkernels.accelerated(backend=BEST):
        program = torch.export.export(model, (ROWS,))
    assert {f"llmkernels.{op}.default" for op in OPS} <= _targets(program.graph)
    torch.testing.assert_close(program.module()(ROWS), expected, rtol=1e-4, atol=1e-5)


def test_trains_alike_in_modules_that_are_not_touched():
    def gradients(model):
        return torch.autograd.grad(model(ROWS).square().sum(), list(model.parameters()))

    model = Untouched()
    expected, types = gradients(model), [type(module) for module in model.modules()]
    with llmkernels.accelerated(backend=BEST) as calls:
        found = gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3 and [type(module) for module in model.modules()] == types


def test_another_thread_is_not_affected():
    seen = []
    with llmkernels.accelerated(backend=BEST) as calls:
        thread = threading.Thread(target=lambda: seen.append(F.layer_norm(ROWS, (24,))))
        thread.start()
        thread.join()
    assert not calls and len(seen) == 1


def test_after_an_exception_torch_is_as_it_was():
    with pytest.raises(KeyError), llmkernels.accelerated(backend=BEST) as calls:
        raise KeyError
    F.layer_norm(ROWS, (24,))
    assert not calls


def test_errors():
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"), llmkernels.accelerated(backend="cudnn"):
        pass
    with pytest.raises(TypeError, match="verify without a model"), llmkernels.accelerated(verify=False):
        pass
    inplace = llmkernels.accelerated(nn.LayerNorm(4), inplace=True)
    with pytest.raises(TypeError, match="inplace is no option here"), inplace:
        pass


def test_the_table_has_both_names_of_a_norm():
    """Dynamo sees through torch.nn.functional's: with it alone compiled code would silently not be accelerated."""
    assert {F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm} <= set(functional_mode._TABLE)
