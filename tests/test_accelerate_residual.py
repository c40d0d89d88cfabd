"""Layers in which a residual is added before a norm: both in one pass, found by the source of a forward."""

import copy
import functools
import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import llmkernels
from llmkernels import _native, functional
from llmkernels.accelerate import residual, timing
from llmkernels.accelerate.kinds import norms
from llmkernels.accelerate.swap import Accelerated

COLS = 24
BACKENDS = ("torch", pytest.param("cpu", marks=pytest.mark.skipif(_native.why_absent("cpu") is not None, reason="-")))


class Layer(nn.Module):
    """Parts of a layer; what is between them is each subclass'."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.LayerNorm(COLS), nn.RMSNorm(COLS, eps=1e-5)
        self.attention, self.mlp, self.drop = nn.Linear(COLS, COLS), nn.Linear(COLS, COLS), nn.Dropout(0.2)


class PreNorm(Layer):
    def forward(self, x, *, scale: float = 1.0, mask=None):
        residual = x
        x = self.before(x)
        x = self.attention(x) * scale
        x = residual + self.drop(x)
        residual = x
        x = self.after(x)
        return residual + self.mlp(x), mask


class PostNorm(Layer):
    def forward(self, x, residual):
        x = self.before(self.drop(self.attention(x)) + residual)
        return self.after(x + self.mlp(x))


class Nested(Layer):
    """As torch's own layers write it."""

    def forward(self, x):
        x = x + self._attend(self.before(x))
        x = x + self.mlp(self.after(x))
        return x

    def _attend(self, x):
        return self.drop(self.attention(x))


class InABranch(Layer):
    def forward(self, hidden, first=True):
        if first:
            with torch.enable_grad():
                total = self.attention(hidden) + hidden
                hidden = self.after(total)
        return hidden - total


class KeepsBoth(Layer):
    def forward(self, x):
        total = kept = x + self.attention(x)
        total = x + self.attention(x)
        kept = total
        return kept * self.after(total)


LAYERS = {
    PreNorm: ("after",), PostNorm: ("before", "after"), Nested: ("after",), InABranch: ("after",),
    KeepsBoth: ("after",),
}  # fmt: skip


def make(kind):
    torch.manual_seed(0)
    layer = kind()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    return layer


def arguments(kind):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, COLS, generator=generator) for _ in range(2 if kind is PostNorm else 1)]


def results(layer, inputs, dtype=torch.float32):
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    torch.manual_seed(3)
    y = layer(*inputs)
    y = y[0] if isinstance(y, tuple) else y
    parameters = [p for p in layer.parameters() if p.requires_grad]
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    return y.detach(), torch.autograd.grad(y, [*inputs, *parameters], cotangent, allow_unused=True)


def replacement(report):
    return {entry.path: entry.replacement for entry in report.swapped}.get("layer")


def accelerate(layer, backend="torch", **options):
    return llmkernels.accelerate(nn.ModuleDict({"layer": layer}), backend=backend, **options)


@pytest.fixture
def fused(monkeypatch):
    """How many sums ran in one pass with a norm."""
    count = []
    for name in ("add_layer_norm", "add_rms_norm"):
        usual = getattr(functional, name)

        def counting(*args, usual=usual, **options):
            count.append(usual.__name__)
            return usual(*args, **options)

        monkeypatch.setattr(norms.functional, name, counting)
    return count


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_sums_are_fused_and_agree(kind, dtype, backend, fused):
    layer, inputs = make(kind).to(dtype), arguments(kind)
    expected, grads = results(layer, inputs, dtype)
    report = accelerate(layer, backend)
    names = LAYERS[kind]
    ops = {"before": "add_layer_norm", "after": "add_rms_norm"}
    assert replacement(report) == ", ".join(f"{ops[name]} ({name})" for name in names), str(report)
    assert isinstance(layer, kind) and isinstance(layer, Accelerated)
    fused.clear()
    found, found_grads = results(layer, inputs, dtype)
    assert fused == [ops[name] for name in names]
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found_grads, grads, rtol=10 * tolerance, atol=10 * tolerance)
    assert llmkernels.restore(layer) == 3 and type(layer) is kind
    assert torch.equal(results(layer, inputs, dtype)[0], expected)


def test_arguments_and_defaults_are_those_of_the_forward():
    layer, (x,) = make(PreNorm).eval(), arguments(PreNorm)
    expected = layer(x, scale=0.5, mask="as given")
    accelerate(layer)
    found = layer(x, scale=0.5, mask="as given")
    assert found[1] == "as given" and layer(x)[1] is None
    torch.testing.assert_close(found[0], expected[0])
    with pytest.raises(TypeError, match="colour"):
        layer(x, colour=1)


# --- proof ----------------------------------------------------------------------------------------------------------

WRONG = {
    "the sum is not what is normed": lambda m, x, r, b: (norms.rms_norm(m, x, b), x + r),
    "the sum is not what comes out": lambda m, x, r, b: (norms.rms_norm(m, x + r, b), r),
    "another eps": lambda m, x, r, b: functional.add_rms_norm(x, r, (COLS,), m.weight, 1e-2, backend=b),
    "a weight more": lambda m, x, r, b: functional.add_rms_norm(x, r, (COLS,), m.weight, m.eps, weight_offset=1.0),
    "no gradient of the residual": lambda m, x, r, b: (norms.rms_norm(m, x + r.detach(), b), x + r.detach()),
    "no gradient of the sum": lambda m, x, r, b: (norms.rms_norm(m, x + r, b), (x + r).detach()),
    "a percent": lambda m, x, r, b: (1.01 * norms.rms_norm(m, x + r, b), x + r),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_sum_is_refused(name, monkeypatch):
    monkeypatch.setattr(residual, "with_residual", lambda run: WRONG[name] if run is norms.rms_norm else None)
    report = accelerate(make(PreNorm))
    assert replacement(report) is None and "disagrees in float64" in report.kept[0].detail, str(report)


class Statement(Layer):
    """Something happens between the sum and the norm."""

    def forward(self, x):
        x = x + self.attention(x)
        x = 2.0 * x
        return self.after(x)


class OtherName(Layer):
    def forward(self, x):
        y = x + self.attention(x)
        return self.after(x) + y


class Difference(Layer):
    def forward(self, x):
        x = x - self.attention(x)
        return self.after(x)


class TwoNorms(Layer):
    def forward(self, x):
        x = x + self.attention(x)
        return self.before(x) * self.after(x)


class Branches(Layer):
    def forward(self, x):
        x = x + self.attention(x)
        if x is not None:
            x = self.after(x)
        return x


def doubled(forward):
    @functools.wraps(forward)
    def twice(*args):
        return 2.0 * forward(*args)

    return twice


class Decorated(Layer):
    @doubled
    def forward(self, x):
        x = x + self.attention(x)
        return self.after(x)


class Closure(Layer):
    def forward(self, x):
        x = x + self.attention(x)
        super().train(self.training)
        return self.after(x)


def without_source():
    scope = {"Layer": Layer}
    exec("class Hidden(Layer):\n    def forward(self, x):\n        return self.after(x + self.attention(x))\n", scope)
    return scope["Hidden"]


UNKNOWN = (Statement, OtherName, Difference, TwoNorms, Branches, Decorated, Closure, without_source())


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_is_written_otherwise_stays(kind):
    layer, inputs = make(kind), arguments(kind)
    expected = results(layer, inputs)
    report = accelerate(layer)
    assert replacement(report) is None and not isinstance(layer, Accelerated) and len(report.swapped) == 2
    torch.testing.assert_close(results(layer, inputs), expected, rtol=1e-5, atol=1e-5)


# --- what is done with layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("forward", "forward_pre", "full_backward"))
def test_hooks_on_the_norm_run(kind, fused):
    layer, seen = make(PreNorm), []
    accelerate(layer)
    handle = getattr(layer.after, f"register_{kind}_hook")(lambda *args: seen.append(kind))
    expected = results(make(PreNorm), arguments(PreNorm))
    torch.testing.assert_close(results(layer, arguments(PreNorm)), expected, rtol=1e-5, atol=1e-5)
    assert seen == [kind]
    handle.remove()
    fused.clear()
    results(layer, arguments(PreNorm))
    assert seen == [kind] and fused == ["add_rms_norm"]


def test_where_types_differ_norms_run_as_ever(fused):
    layer, (x,) = make(PreNorm).eval(), arguments(PreNorm)
    accelerate(layer)
    fused.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # x is fp32, what the linear layer gives bf16
        expected, found = make(PreNorm).eval()(x)[0], layer(x)[0]
    assert not fused and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_norms_that_are_not_swapped_are_not_fused(fused):
    layer = make(PreNorm)
    assert replacement(accelerate(layer, exclude=nn.RMSNorm)) is None and type(layer) is PreNorm
    other = make(PreNorm)
    accelerate(other)
    llmkernels.restore(other.after)
    fused.clear()
    other(*arguments(PreNorm))
    assert not fused, "given back by itself"
    third = make(PreNorm)
    assert "excluded" in accelerate(third, exclude="layer").kept[0].detail


def test_one_class_for_layers_of_one_kind_copies_and_pickles(fused):
    model = nn.Sequential(make(PreNorm), make(PreNorm))
    report = llmkernels.accelerate(model, backend="torch")
    assert len(report.swapped) == 6 and type(model[0]) is type(model[1]) and isinstance(model[0], PreNorm)
    x = arguments(PreNorm)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fused.clear()
        other.eval(), model.eval()
        assert torch.equal(other[0](x)[0], model[0](x)[0]) and fused == 2 * ["add_rms_norm"]
        assert type(other[0]) is type(model[0]) and llmkernels.restore(other) == 6


def test_compiled_and_checkpointed():
    layer, inputs = make(Nested).eval(), arguments(Nested)
    expected = results(layer, inputs)
    accelerate(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    saving = functools.partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)
    saving.parameters = layer.parameters
    for run in (compiled, saving):
        torch.testing.assert_close(results(run, inputs), expected, rtol=1e-4, atol=1e-5)


def test_slower_layers_are_dropped(monkeypatch):
    monkeypatch.setattr(residual._Fused, "timed", lambda *args: "timed")
    monkeypatch.setattr(timing, "calls", lambda trial, training: trial)
    monkeypatch.setattr(timing, "ratio", lambda given: 0.5 if given == "timed" else 2.0)
    report = accelerate(make(PreNorm), benchmark=True)
    assert [(entry.path, entry.detail, entry.speed) for entry in report.kept] == [
        ("layer", "measured, it is slower", 0.5)
    ]
