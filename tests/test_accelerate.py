"""accelerate and restore: what must be swapped, what must be refused, and that nothing is lost."""

import copy
import io

import pytest
import torch
from torch import nn

import llmkernels
from llmkernels.accelerate.candidate import Candidate, user_rules
from llmkernels.accelerate.kinds.norms import rms_norm

COLS = 24


class LlamaNorm(nn.Module):
    def __init__(self, eps=1e-6, cols=COLS):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(cols))
        self.variance_epsilon = eps

    def normalize(self, x, eps):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def forward(self, x):
        return self.weight * self.normalize(x.float(), self.variance_epsilon).to(x.dtype)


class GemmaNorm(LlamaNorm):
    def __init__(self, eps=1e-6, cols=COLS):
        super().__init__(eps, cols)
        nn.init.zeros_(self.weight)

    def forward(self, x):
        return (self.normalize(x.float(), self.variance_epsilon) * (1.0 + self.weight.float())).type_as(x)


class MeanSubtracting(LlamaNorm):
    """A LayerNorm without bias, in the shape of an RMSNorm."""

    def normalize(self, x, eps):
        return super().normalize(x - x.mean(-1, keepdim=True), eps)


class WrongEps(LlamaNorm):
    def normalize(self, x, eps):
        return super().normalize(x, 10 * eps)


class WrongDimension(LlamaNorm):
    def normalize(self, x, eps):
        return x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + eps)


class WeightFirst(LlamaNorm):
    def forward(self, x):
        return self.normalize(x * self.weight, self.variance_epsilon)


class OtherDtype(LlamaNorm):
    def forward(self, x):
        return super().forward(x).half()


class NormWithState(LlamaNorm):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))


class WithDropout(LlamaNorm):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class TwoArguments(LlamaNorm):
    def forward(self, x, residual):
        return super().forward(x + residual)


class NoMean(nn.LayerNorm):
    """Called a LayerNorm, but it does not subtract the mean."""

    def forward(self, x):
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps) + self.bias


def accelerate(model, backend="torch"):
    """With the torch backend forced, so that these tests hold where nothing is compiled."""
    return llmkernels.accelerate(model, backend=backend)


GOOD = {
    "LayerNorm": lambda: nn.LayerNorm(COLS),
    "LayerNorm without bias": lambda: nn.LayerNorm(COLS, bias=False),
    "LayerNorm without parameters": lambda: nn.LayerNorm(COLS, elementwise_affine=False),
    "LayerNorm of two dimensions": lambda: nn.LayerNorm((4, 6)),
    "RMSNorm": lambda: nn.RMSNorm(COLS),
    "RMSNorm with eps": lambda: nn.RMSNorm(COLS, eps=1e-5),
    "Llama": LlamaNorm,
    "Gemma": GemmaNorm,
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("name", GOOD)
def test_swaps_and_agrees(name, dtype):
    model = nn.Sequential(GOOD[name]()).to(dtype)
    x = torch.randn(3, 4, 6 if "two" in name else COLS, dtype=dtype)
    expected = model(x)
    report = accelerate(model)
    assert [entry.swapped for entry in report.entries] == [True], str(report)
    y = model(x)
    assert y.dtype == expected.dtype
    tolerance = max(4 * torch.finfo(dtype).eps, 5e-7)  # Llama and Gemma compute in fp32, also in an fp64 model
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "norm",
    (MeanSubtracting, WrongEps, WrongDimension, WeightFirst, OtherDtype, NormWithState, WithDropout, TwoArguments,
     lambda: NoMean(COLS)),
)  # fmt: skip
def test_refuses(norm):
    model = nn.Sequential(norm())
    before = type(model[0])
    report = accelerate(model)
    assert [entry.swapped for entry in report.entries] == [False]
    assert report.kept[0].detail != "" and type(model[0]) is before


def test_refuses_what_drops_in_training_alone_in_either_mode():
    for mode in (True, False):
        model = nn.Sequential(WithDropout()).train(mode)
        report = accelerate(model)
        assert "disagrees in float64" in report.kept[0].detail and model[0].training is mode


@pytest.mark.parametrize("norm, form", ((LlamaNorm, "(weight)"), (GemmaNorm, "(1 + weight)")))
def test_the_form_is_found_and_not_assumed(norm, form):
    report = accelerate(nn.Sequential(norm()))
    assert form in report.swapped[0].detail


def test_a_rule_that_offers_the_wrong_form_is_refused():
    @llmkernels.accelerate.rule(GemmaNorm)
    def wrong_form(module):
        def run(module, x, backend):
            shape, eps = (COLS,), module.variance_epsilon
            return llmkernels.functional.rms_norm(x, shape, module.weight, eps, backend=backend)

        return [Candidate("rms_norm", "Llama's form", (COLS,), run)]

    try:
        report = accelerate(nn.Sequential(GemmaNorm()))
        assert "Llama's form disagrees" in report.kept[0].detail
    finally:
        del user_rules[GemmaNorm]


def test_a_users_rule_is_used():
    class Mine(nn.RMSNorm):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    @llmkernels.accelerate.rule(Mine)
    def mine(module):
        return [Candidate("rms_norm", "mine", tuple(module.normalized_shape), rms_norm)]

    assert "mine on torch" in accelerate(nn.Sequential(Mine(COLS))).swapped[0].detail


ATTENTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "other widths": {"kdim": 10, "vdim": 40, "batch_first": True},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
    "dropout": {"dropout": 0.5},
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_swaps_and_agrees(name, dtype):
    module = nn.MultiheadAttention(COLS, 4, dtype=dtype, **ATTENTIONS[name]).eval()
    query = torch.randn(3, 3, COLS, dtype=dtype)
    key, value = (torch.randn(3, 3, width, dtype=dtype) for width in (module.kdim, module.vdim))
    expected = module(query, key, value), module(query, key, value, need_weights=False)[0]
    report = accelerate(module.train(), "torch")
    assert "fused attention on torch" in report.swapped[0].detail, str(report)
    assert module.training, "as before"
    module.eval()
    found = module(query, key, value), module(query, key, value, need_weights=False)[0]
    torch.testing.assert_close(
        found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2 if dtype == torch.bfloat16 else 1e-5
    )
    assert llmkernels.restore(module) == 1 and type(module) is nn.MultiheadAttention
    assert all(torch.equal(a, b) for a, b in zip(module(query, key, value), expected[0], strict=True))


class TransposedHeads(nn.MultiheadAttention):
    """Its own forward, so it is left alone."""

    def forward(self, query, key, value, **options):
        return super().forward(query.flip(-1), key, value, **options)


def test_wide_attention_agrees_and_a_changed_one_is_left_alone(monkeypatch):
    assert accelerate(nn.MultiheadAttention(768, 12)).swapped
    assert not accelerate(nn.Sequential(TransposedHeads(COLS, 4))).entries
    module = nn.MultiheadAttention(COLS, 4)
    monkeypatch.setattr(module, "head_dim", 7)  # a scale that is not torch's
    assert "fused attention disagrees" in accelerate(module).kept[0].detail


def test_torchs_transformer_layer_trains_alike():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(COLS, 4, 40, dropout=0.0, batch_first=True)
    x = torch.randn(2, 7, COLS)
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    run = lambda: (layer(x), layer(x, causal, is_causal=True), layer(x, src_key_padding_mask=padding)[~padding])
    grads = lambda outputs: torch.autograd.grad(sum(out.square().sum() for out in outputs), list(layer.parameters()))
    outputs = run()
    expected = outputs, grads(outputs)
    assert len(accelerate(layer).swapped) == 4
    outputs = run()
    torch.testing.assert_close((outputs, grads(outputs)), expected, rtol=1e-4, atol=1e-4)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected[0][0], rtol=1e-4, atol=1e-5)
    assert llmkernels.restore(layer) == 4


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.up, self.down = norm(), nn.Linear(COLS, 2 * COLS), nn.Linear(2 * COLS, COLS)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def model_of(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(17, COLS), Block(norm), Block(norm), norm(), nn.Linear(COLS, 17))


@pytest.mark.parametrize("norm", (LlamaNorm, GemmaNorm, lambda: nn.LayerNorm(COLS)))
def test_model_trains_alike_and_restores_bitwise(norm):
    tokens = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(1))
    plain, fast = model_of(norm), model_of(norm)
    objects, keys = list(fast.modules()), list(fast.state_dict())
    parameters = list(fast.parameters())
    logits = fast(tokens)
    assert len(accelerate(fast).swapped) == 3
    assert list(fast.state_dict()) == keys
    assert all(a is b for a, b in zip(fast.parameters(), parameters, strict=True))
    torch.testing.assert_close(fast(tokens), logits)

    for model in (plain, fast):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
    for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    assert llmkernels.restore(fast) == 3
    assert all(a is b for a, b in zip(fast.modules(), objects, strict=True))
    assert [type(a) for a in fast.modules()] == [type(b) for b in plain.modules()]
    plain.load_state_dict(fast.state_dict())
    assert torch.equal(plain(tokens), fast(tokens))


def test_hooks_ties_copies_and_pickles():
    shared = nn.RMSNorm(COLS)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.LayerNorm(COLS)})
    calls = []
    shared.register_forward_hook(lambda *_: calls.append("hook"))
    report = accelerate(model)
    assert calls == [], "verification must not run the user's hooks"
    assert len(report.entries) == 2 and model["a"] is model["b"] is shared
    x = torch.randn(2, COLS)
    y = model["b"](x)
    assert calls == ["hook"] and isinstance(shared, nn.RMSNorm)

    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate["b"](x), y) and duplicate["b"].weight is not shared.weight
    assert llmkernels.restore(duplicate) == 2 and type(duplicate["a"]) is nn.RMSNorm
    assert type(shared) is not nn.RMSNorm

    del shared._forward_hooks[next(iter(shared._forward_hooks))]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded["b"](x), y) and loaded["a"] is loaded["b"]
    assert llmkernels.restore(loaded) == 2


def test_nothing_of_the_users_is_touched():
    model = nn.Sequential(nn.Linear(COLS, COLS), nn.LayerNorm(COLS), LlamaNorm())
    model(torch.randn(2, COLS)).sum().backward()
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(before[1], model.parameters(), strict=True))
    assert not any(p.grad is None for p in model.parameters())


def test_twice_is_once_and_the_context_restores():
    model = nn.Sequential(nn.LayerNorm(COLS))
    with pytest.raises(KeyError), llmkernels.accelerated(model, backend="torch"):
        assert type(model[0]) is not nn.LayerNorm
        raise KeyError
    assert type(model[0]) is nn.LayerNorm
    accelerate(model)
    assert accelerate(model).swapped[0].detail == "swapped before"
    with llmkernels.accelerated(model, backend="torch"):
        pass
    assert type(model[0]) is not nn.LayerNorm, "what was accelerated before the context stays so"
    assert llmkernels.restore(model) == 1


def test_a_norm_alone_and_compile_and_checkpoint():
    norm = nn.LayerNorm(COLS)
    x = torch.randn(2, COLS, requires_grad=True)
    expected = norm(x)
    assert accelerate(norm).swapped[0].path == ""
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False), expected)


def test_where_only_torch_runs_nothing_is_swapped(monkeypatch):
    monkeypatch.setattr("llmkernels._native.why_absent", lambda name: "not built (no compiler)")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    report = llmkernels.accelerate(nn.Sequential(nn.LayerNorm(COLS)))
    assert "nothing faster than plain PyTorch" in report.kept[0].detail and "no compiler" in report.kept[0].detail


def test_errors_and_report():
    with pytest.raises(TypeError, match="expected a torch.nn.Module"):
        llmkernels.accelerate(torch.nn.functional.relu)
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        llmkernels.accelerate(nn.LayerNorm(4), backend="cudnn")
    report = accelerate(nn.Sequential(nn.LayerNorm(COLS), MeanSubtracting()))
    assert str(report).startswith("accelerate: 1 swapped, 1 kept")
    assert report.to_dict()["entries"][0]["module"] == "LayerNorm" and "1 kept" in report._repr_html_()
