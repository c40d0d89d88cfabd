"""`llmkernels.explain` for the ops whose public functions prepare their tensors before they ask for a backend."""

import pytest
import torch

import llmkernels
from llmkernels import functional, registry


def tensors(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, 4, 8, generator=generator) for length in lengths]


def calls():
    q, k, v = tensors(3, 5, 5)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    ends = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (3, 5)]
    out, lse = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3)
    return {
        "scaled_dot_product_attention": (heads_first, {"dropout_p": 0.1, "is_causal": True}),
        "attention_varlen": ([*(x.flatten(0, 1) for x in (q, k, v)), *ends, 3, 5], {"causal": "bottom_right"}),
        "attention_kvcache": ([q, k, v], {"cache_seqlens": 2, "k": k[:, :3], "v": v[:, :3]}),
        "merge_attention": ([out, lse, out, lse], {}),
        "layer_norm": ([q, (8,)], {}),
        "swiglu": ([q], {}),
    }


@pytest.mark.parametrize("op", calls())
def test_explains_a_call_and_does_nothing_else(op):
    args, kwargs = calls()[op]
    state, before = torch.get_rng_state(), [x.clone() for x in args if isinstance(x, torch.Tensor)]
    explained = llmkernels.explain(op, *args, **kwargs)
    assert explained.op == op and explained.chosen in explained.reasons and explained.reasons[explained.chosen] is None
    assert list(explained.reasons)[-1] == "torch"
    assert str(explained).startswith(f"{op}: {explained.chosen} runs")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, (x for x in args if isinstance(x, torch.Tensor)), before))


def test_the_explained_backend_is_the_one_that_is_asked():
    args, kwargs = calls()["scaled_dot_product_attention"]
    explain = lambda **more: llmkernels.explain("scaled_dot_product_attention", *args, **kwargs, **more)
    assert explain(backend="torch").chosen == "torch"
    with llmkernels.use_backend("torch"):
        assert explain().chosen == "torch"
    forced = explain(backend="cuda")
    assert forced.chosen is None and "no backend runs" in str(forced)
    assert "input is on the CPU" in forced.reasons["cuda"]


def test_every_op_of_the_registry_can_be_explained():
    assert set(registry.ops()) <= set(functional.__all__)
    with pytest.raises(ValueError, match="unknown op 'attend'; known: .*merge_attention"):
        llmkernels.explain("attend")


@pytest.mark.parametrize("backend", ("cpu", "triton"))
def test_reasons_of_attention_are_about_the_call(backend):
    args, kwargs = calls()["scaled_dot_product_attention"]
    if llmkernels.explain("scaled_dot_product_attention", *args, **kwargs).reasons[backend] is not None:
        pytest.skip(f"{backend}: absent here")
    wide = llmkernels.explain("scaled_dot_product_attention", *(x.double() for x in args), **kwargs)
    assert wide.chosen == "torch" and wide.reasons[backend] == "fp64 runs on torch alone"
    slopes = torch.ones(4, requires_grad=True)
    sloped = llmkernels.explain("scaled_dot_product_attention", *args, alibi_slopes=slopes)
    assert "alibi_slopes requires a gradient" in sloped.reasons[backend]


def test_wrong_arguments_raise_what_the_function_raises():
    args, kwargs = calls()["attention_kvcache"]
    with pytest.raises(ValueError, match="attention_kvcache: softcap is -1"):
        llmkernels.explain("attention_kvcache", *args, **kwargs, softcap=-1)
