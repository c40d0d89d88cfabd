"""nn.MultiheadAttention beside torch.nn.MultiheadAttention: every option, gradients, state_dict, errors."""

import copy
import inspect

import pytest
import torch

import llmkernels
from llmkernels import nn

E, H, N, L, S = 16, 4, 2, 5, 7
TORCH = torch.nn.MultiheadAttention


def pair(dtype=torch.float64, **settings):
    """(ours, torch's) with the same random parameters, biases too."""
    theirs = TORCH(E, H, dtype=dtype, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    ours = nn.MultiheadAttention(E, H, dtype=dtype, backend="torch", **settings)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def tensors(kind="cross", batch_first=False, unbatched=False, kdim=E, vdim=E, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)

    def make(length, width):
        shape = (length, width) if unbatched else (N, length, width) if batch_first else (length, N, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    if kind == "self":
        x = make(S, E)
        return x, x, x
    key = make(S, kdim)
    return make(L, E), key, key if kind == "memory" else make(S, vdim)


def masks(padding, mask, queries, unbatched=False, dtype=torch.float64):
    """The arguments of these names; no query is left without keys."""
    generator = torch.Generator().manual_seed(3)
    made = {}
    if padding:
        hidden = torch.zeros((S,) if unbatched else (N, S), dtype=torch.bool)
        hidden[..., -2:] = True
        made["key_padding_mask"] = (
            hidden if padding == "bool" else torch.randn(hidden.shape, generator=generator).to(dtype)
        )
    if mask:
        shape = (queries, S) if mask.endswith("2") else ((1 if unbatched else N) * H, queries, S)
        hidden = torch.rand(shape, generator=generator) < 0.3
        hidden[..., 0] = False
        additive = torch.randn(shape, generator=generator).to(dtype).masked_fill(hidden, -torch.inf)
        made["attn_mask"] = hidden if mask.startswith("bool") else additive
    return made


def compare(modules, inputs, tolerance=1e-9, **arguments):
    """Outputs, weights and all gradients."""
    leaves = list({id(x): x for x in inputs}.values())
    results = []
    for module in modules:
        out, weights = module(*inputs, **arguments)
        loss = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum()
        if weights is not None and weights.requires_grad:
            loss = loss + weights.square().sum()
        grads = torch.autograd.grad(loss, [*leaves, *module.parameters()])
        results.append((out, weights, *grads))
    assert (results[0][1] is None) == (results[1][1] is None)
    for mine, other in zip(*results, strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("need_weights", (True, False), ids=("weights", ""))
@pytest.mark.parametrize("batch_first", (True, False), ids=("batch_first", ""))
@pytest.mark.parametrize("kind", ("self", "memory", "cross"))
@pytest.mark.parametrize("bias", (True, False), ids=("bias", ""))
def test_projections(bias, kind, batch_first, need_weights):
    modules = pair(bias=bias, batch_first=batch_first)
    compare(modules, tensors(kind, batch_first), need_weights=need_weights)


@pytest.mark.parametrize("need_weights", (True, False), ids=("weights", ""))
@pytest.mark.parametrize("padding", (None, "bool", "additive"))
@pytest.mark.parametrize("mask", (None, "bool2", "bool3", "additive2", "additive3"))
@pytest.mark.parametrize("unbatched", (False, True), ids=("", "unbatched"))
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks(unbatched, mask, padding, need_weights):
    for extra in ({}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}):
        arguments = masks(padding, mask, L, unbatched)
        compare(pair(**extra), tensors(unbatched=unbatched), need_weights=need_weights, **arguments)


@pytest.mark.parametrize("bias", (True, False), ids=("bias", ""))
@pytest.mark.parametrize("batch_first", (True, False), ids=("batch_first", ""))
@pytest.mark.parametrize("kdim, vdim", ((6, 9), (E, 9), (6, None)))
def test_other_widths_of_key_and_value(kdim, vdim, batch_first, bias):
    modules = pair(kdim=kdim, vdim=vdim, batch_first=batch_first, bias=bias, add_bias_kv=True)
    for need_weights in (True, False):
        inputs = tensors("cross", batch_first, kdim=kdim, vdim=vdim or E)
        compare(modules, inputs, need_weights=need_weights, average_attn_weights=False)


@pytest.mark.parametrize("batch_first", (True, False), ids=("batch_first", ""))
def test_weights_of_each_head(batch_first):
    modules, inputs = pair(batch_first=batch_first), tensors("cross", batch_first)
    compare(modules, inputs, average_attn_weights=False, **masks("bool", "bool3", L))
    assert modules[0](*inputs, average_attn_weights=False)[1].shape == (N, H, L, S)
    assert modules[0](*inputs)[1].shape == (N, L, S)
    compare(modules, tensors(unbatched=True), average_attn_weights=False)


@pytest.mark.parametrize("need_weights", (True, False), ids=("weights", ""))
@pytest.mark.parametrize("padding", (None, "bool"))
@pytest.mark.parametrize("extra", ({}, {"add_bias_kv": True}, {"add_zero_attn": True}), ids=str)
def test_the_hint_is_causal(extra, padding, need_weights):
    """The mask is not read where torch does not read it, wrong hint or not."""
    modules, inputs = pair(**extra), tensors("self")
    causal = torch.ones(S, S, dtype=torch.bool).triu(1)
    padding = masks("bool", None, S) if padding else {}
    for mask in (
        causal,
        torch.zeros(S, S, dtype=torch.bool),
        torch.zeros(S, S, dtype=torch.float64).masked_fill(causal, -torch.inf),
    ):
        if mask.dtype != torch.bool and padding:
            continue
        compare(modules, inputs, need_weights=need_weights, attn_mask=mask, is_causal=True, **padding)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_other_dtypes(dtype):
    ours, theirs = pair(dtype)
    inputs = tensors(dtype=dtype)
    for need_weights in (True, False):
        for found, expected in zip(
            ours(*inputs, need_weights=need_weights), theirs(*inputs, need_weights=need_weights), strict=True
        ):
            if expected is not None:
                tolerance = 1e-5 if dtype == torch.float32 else 3e-2
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("extra", ({}, {"add_bias_kv": True, "add_zero_attn": True}), ids=str)
@pytest.mark.parametrize("mask", (None, "bool2", "additive3"))
def test_autocast(mask, extra):
    ours, theirs = pair(torch.float32, **extra)
    inputs = tensors(dtype=torch.float32)
    arguments = masks(None, mask, L, dtype=torch.float32)
    for need_weights in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            (out, weights), (expected, expected_weights) = (
                m(*inputs, need_weights=need_weights, **arguments) for m in (ours, theirs)
            )
        torch.testing.assert_close(out, expected, rtol=6e-2, atol=6e-2)
        if need_weights:
            torch.testing.assert_close(weights, expected_weights, rtol=2e-2, atol=2e-2)


def test_dropout_is_of_training_and_the_weights_show_it():
    module = nn.MultiheadAttention(E, H, dropout=0.5, bias=False, dtype=torch.float64, backend="torch")
    query, key, value = tensors()
    torch.manual_seed(1)
    out, weights = module(query, key, value, average_attn_weights=False)
    torch.manual_seed(1)
    again, none = module(query, key, value, need_weights=False)
    assert none is None and torch.equal(out, again)
    zeros = (weights == 0).double().mean()
    assert 0.3 < zeros < 0.7
    v = (value @ module.in_proj_weight[2 * E :].T).unflatten(-1, (H, -1)).permute(1, 2, 0, 3)
    expected = (weights @ v).permute(2, 0, 1, 3).flatten(2) @ module.out_proj.weight.T
    torch.testing.assert_close(out, expected)
    module.eval()
    first, second = module(query, key, value), module(query, key, value)
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[1].sum(-1), torch.ones(N, L, dtype=torch.float64))


def test_a_query_without_keys_attends_to_nothing():
    module, _ = pair()
    hidden = torch.ones(N, S, dtype=torch.bool)
    hidden[1] = False
    inputs = tensors()
    for mask in (hidden, torch.zeros(N, S, dtype=torch.float64).masked_fill(hidden, -torch.inf)):
        out, weights = module(*inputs, key_padding_mask=mask)
        torch.testing.assert_close(out[:, 0], module.out_proj.bias.expand(L, E))
        assert not weights[0].any()
        assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.sum() + weights.sum(), inputs))


def test_finfo_min_masks_hide_like_torchs():
    modules = pair(torch.float32)
    mask = torch.zeros(N, S).masked_fill(masks("bool", None, L)["key_padding_mask"], torch.finfo(torch.float32).min)
    mask[1] = torch.finfo(torch.float32).min
    compare(modules, tensors(dtype=torch.float32), 1e-4, key_padding_mask=mask)


SETTINGS = ({}, {"bias": False}, {"kdim": 6}, {"add_bias_kv": True}, {"vdim": 3, "bias": False, "add_bias_kv": True})


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_state_dict_goes_both_ways(settings):
    ours, theirs = pair(**settings)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    other = TORCH(E, H, dtype=torch.float64, **settings)
    other.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), theirs.parameters(), strict=True))
    torch.manual_seed(5)
    first = nn.MultiheadAttention(E, H, **settings)
    torch.manual_seed(5)
    second = TORCH(E, H, **settings)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)), (
        "initialised alike"
    )
    assert nn.MultiheadAttention(E, H, device="meta", dtype=torch.bfloat16, **settings).out_proj.weight.is_meta
    assert torch.equal(copy.deepcopy(ours).out_proj.weight, ours.out_proj.weight)


def test_signatures_are_torchs():
    for name in ("__init__", "forward"):
        mine, other = (inspect.signature(getattr(cls, name)).parameters for cls in (nn.MultiheadAttention, TORCH))
        assert [(p.name, p.default) for p in mine.values()][: len(other)] == [
            (p.name, p.default) for p in other.values()
        ]
        assert all(p.kind is p.KEYWORD_ONLY for p in list(mine.values())[len(other) :])


def test_it_serves_in_torchs_transformer():
    torch.manual_seed(0)
    layer = torch.nn.TransformerDecoderLayer(E, H, 20, dropout=0.0, batch_first=True, dtype=torch.float64)
    x, memory = torch.randn(N, S, E, dtype=torch.float64), torch.randn(N, L, E, dtype=torch.float64)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
    arguments = {"tgt_mask": causal, "tgt_is_causal": True}
    expected = layer(x, memory, **arguments)
    for name in ("self_attn", "multihead_attn"):
        module = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, backend="torch")
        module.load_state_dict(getattr(layer, name).state_dict())
        setattr(layer, name, module)
    torch.testing.assert_close(layer(x, memory, **arguments), expected)


def test_compile_export_functional_and_checkpoint():
    module, _ = pair(torch.float32, batch_first=True)
    inputs = tensors(batch_first=True, dtype=torch.float32)
    expected = module(*inputs)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs), expected)
    checkpointed = torch.utils.checkpoint.checkpoint(module, *inputs, use_reentrant=False)
    torch.testing.assert_close(checkpointed, expected)
    parameters = dict(module.named_parameters())
    loss = lambda parameters: torch.func.functional_call(module, parameters, inputs)[0].cos().sum()
    grads = torch.func.grad(loss)(parameters)
    theirs = torch.autograd.grad(loss(parameters), list(parameters.values()))
    torch.testing.assert_close(list(grads.values()), list(theirs))
    exported = torch.export.export(module, inputs, {"need_weights": False})
    assert "llmkernels.attention_fwd.default" in {str(node.target) for node in exported.graph.nodes}


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


X = zeros(L, N, E)
ERRORS = [
    (ValueError, r"query has shape \(16,\), expected \(", lambda m: m(zeros(E), zeros(E), zeros(E))),
    (ValueError, r"key has shape \(7, 16\), expected \(length, batch, 16\)", lambda m: m(X, zeros(S, E), zeros(S, E))),
    (ValueError, r"key has shape \(7, 2, 8\), expected \(length, batch, 16\)", lambda m: m(X, zeros(S, N, 8), X)),
    (ValueError, r"value has shape \(5, 2, 16\), expected \(7, 2\) before", lambda m: m(X, zeros(S, N, E), X)),
    (ValueError, r"key has shape \(7, 3, 16\), expected a batch of 2", lambda m: m(X, zeros(S, 3, E), zeros(S, 3, E))),
    (ValueError, r"key_padding_mask has shape \(5, 2\), expected \(2, 5\)", lambda m: m(X, X, X, zeros(L, N))),
    (ValueError, r"attn_mask has shape \(5, 4\), expected \(5, 5\) or \(8, 5, 5\)",
     lambda m: m(X, X, X, attn_mask=zeros(5, 4))),
    (ValueError, r"attn_mask has shape \(2, 5, 5\), expected", lambda m: m(X, X, X, attn_mask=zeros(2, 5, 5))),
    (TypeError, "attn_mask has dtype torch.int64, expected bool or a floating",
     lambda m: m(X, X, X, attn_mask=zeros(5, 5).long())),
    (ValueError, "attn_mask is on meta, expected cpu", lambda m: m(X, X, X, attn_mask=zeros(5, 5, device="meta"))),
    (ValueError, "is_causal=True is a hint about attn_mask, which is None", lambda m: m(X, X, X, is_causal=True)),
    (TypeError, "query is a nested tensor", lambda m: m(*[torch.nested.nested_tensor([zeros(2, E), zeros(3, E)])] * 3)),
    (ValueError, "embed_dim is 10, expected a positive multiple of 4 heads", lambda m: nn.MultiheadAttention(10, 4)),
    (ValueError, "embed_dim is 0, expected a positive multiple", lambda m: nn.MultiheadAttention(0, 4)),
    (ValueError, "dropout is 1.5, expected a probability", lambda m: nn.MultiheadAttention(8, 4, dropout=1.5)),
]  # fmt: skip


@pytest.mark.parametrize("error, message, call", ERRORS, ids=[message[:30] for _, message, _ in ERRORS])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_errors(error, message, call):
    with pytest.raises(error, match=f"MultiheadAttention: {message}"):
        call(nn.MultiheadAttention(E, H, backend="torch"))


def test_backend_is_forced():
    with pytest.raises(llmkernels.NoBackendError, match="cuda: input is on the CPU"):
        nn.MultiheadAttention(E, H, backend="cuda")(X, X, X)


@pytest.mark.parametrize("queries, keys", ((0, 0), (0, 3), (3, 0)))
def test_empty_sequences(queries, keys):
    module, _ = pair()
    x = lambda length: torch.zeros(length, N, E, dtype=torch.float64, requires_grad=True)
    out, weights = module(x(queries), x(keys), x(keys))
    assert out.shape == (queries, N, E) and weights.shape == (N, queries, keys) and torch.isfinite(out).all()
