"""The options of accelerate: what may be swapped, how it is judged, and that nothing stays half done."""

import dataclasses
import json

import pytest
import rich.console
import torch
from torch import nn

import llmkernels
from llmkernels.accelerate import Report, session, timing
from llmkernels.accelerate.candidate import Candidate, user_rules
from llmkernels.accelerate.kinds.norms import rms_norm

COLS = 24


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.act = nn.LayerNorm(COLS), nn.Linear(COLS, COLS), nn.GELU()

    def forward(self, x):
        return x + self.act(self.linear(self.norm(x)))


def model_of(blocks=2):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks)), nn.RMSNorm(COLS))


def accelerate(model, **options):
    return llmkernels.accelerate(model, **{"backend": "torch"} | options)


def paths(entries):
    return [entry.path for entry in entries]


SELECTIONS = {
    "all": ({}, ["0.norm", "0.act", "1.norm", "1.act", "2"]),
    "a path and what is under it": ({"include": "0"}, ["0.norm", "0.act"]),
    "a glob": ({"include": "*.norm"}, ["0.norm", "1.norm"]),
    "a class": ({"include": nn.RMSNorm}, ["2"]),
    "a function": ({"include": lambda path, module: path.endswith("act")}, ["0.act", "1.act"]),
    "a list": ({"include": ["0.norm", nn.RMSNorm]}, ["0.norm", "2"]),
    "without a path": ({"exclude": "1"}, ["0.norm", "0.act", "2"]),
    "without classes": ({"exclude": (nn.GELU, nn.RMSNorm)}, ["0.norm", "1.norm"]),
    "both": ({"include": "*.norm", "exclude": "0.*"}, ["1.norm"]),
    "nothing": ({"include": []}, []),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_include_and_exclude(name):
    options, expected = SELECTIONS[name]
    model = model_of()
    report = accelerate(model, **options)
    assert paths(report.swapped) == expected
    assert {entry.detail for entry in report.kept} <= {"excluded", "not included"}
    assert len(report.entries) == 5 and llmkernels.restore(model) == len(expected)


def test_a_shared_module_is_what_any_of_its_paths_is():
    shared = nn.LayerNorm(COLS)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert not accelerate(model, exclude="b").swapped
    assert paths(accelerate(model, include="b").swapped) == ["a"]


@pytest.mark.parametrize("argument", ("include", "exclude"))
def test_a_selector_of_a_wrong_type(argument):
    with pytest.raises(TypeError, match=f"{argument} has 3, expected a path or glob"):
        accelerate(model_of(), **{argument: [3]})


def test_not_in_place():
    model = model_of()
    x = torch.randn(2, COLS)
    report = accelerate(model, inplace=False)
    assert report.model is not model and type(model[0].norm) is nn.LayerNorm
    assert type(report.model[0].norm) is not nn.LayerNorm
    torch.testing.assert_close(report.model(x), model(x))
    assert accelerate(model).model is model


def test_unverified_is_swapped_unseen_but_forms_are_told_apart(monkeypatch):
    monkeypatch.setattr(session.Verifier, "verify", lambda *_: pytest.fail("verified"))
    report = accelerate(model_of(), verify=False)
    assert len(report.swapped) == 5 and all(entry.error is None for entry in report.swapped)


def test_alike_modules_are_verified_once(monkeypatch):
    seen = []
    usual = session.Verifier._generated
    monkeypatch.setattr(session.Verifier, "_generated", lambda *args: seen.append(args[1]) or usual(*args))
    assert len(accelerate(model_of(6)).swapped) == 13 and len(seen) == 3
    seen.clear()
    different = nn.Sequential(nn.LayerNorm(COLS), nn.LayerNorm(COLS, eps=1e-3), nn.LayerNorm(COLS).bfloat16())
    assert len(accelerate(different).swapped) == 3 and len(seen) == 3


def test_an_exception_restores_the_model(monkeypatch):
    """Whatever is raised, after whatever was swapped; what was swapped before stays."""
    model = model_of()
    accelerate(model, include="0")
    before = [type(module) for module in model.modules()]
    usual, count = session.Session._consider, []

    def third_fails(*args):
        count.append(args)
        if len(count) == 3:
            raise KeyboardInterrupt
        return usual(*args)

    monkeypatch.setattr(session.Session, "_consider", third_fails)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model)
    assert [type(module) for module in model.modules()] == before and len(count) == 3
    assert llmkernels.restore(model) == 2


# --- what is left alone, with the reason ------------------------------------------------------------------------------


class Scaled(nn.LayerNorm):
    def forward(self, x):
        return 2.0 * super().forward(x)


class WithExtraState(nn.LayerNorm):
    count = 3

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


def _two_devices():
    norm = nn.LayerNorm(COLS)
    norm.bias = nn.Parameter(norm.bias.to("meta"))
    return norm


class _Elsewhere(torch.Tensor):
    """Says that it is on another device."""

    device = torch.device("cuda", 0)


def _mixed():
    norm = nn.LayerNorm(COLS)
    norm._parameters["bias"] = torch.Tensor._make_subclass(_Elsewhere, norm.bias.data)
    return norm


def _replaced():
    norm = nn.LayerNorm(COLS)
    norm.forward = lambda x: x
    return norm


class _Sharded(torch.Tensor):
    """Says that it is spread over devices, as a DTensor does."""

    placements = ("Shard(0)",)


def _sharded():
    norm = nn.LayerNorm(COLS)
    norm._parameters["weight"] = torch.Tensor._make_subclass(_Sharded, norm.weight.data)
    return norm


class _Lazy(nn.modules.lazy.LazyModuleMixin, nn.LayerNorm):
    """Its weight is made of the first input."""

    def __init__(self):
        super().__init__(COLS)
        self.weight = nn.UninitializedParameter()

    forward = nn.LayerNorm.forward


def _for_inference():
    with torch.inference_mode():
        return nn.LayerNorm(COLS)


LEFT_ALONE = {
    "TorchScript": (lambda: torch.jit.script(nn.LayerNorm(COLS)), "it is TorchScript"),
    "made in inference mode": (_for_inference, "made in inference mode"),
    "lazy": (_Lazy, "no shape before its first input"),
    "a forward of its own": (lambda: Scaled(COLS), "not a known norm"),
    "the meta device": (lambda: nn.LayerNorm(COLS, device="meta"), "meta device"),
    "partly on the meta device": (_two_devices, "meta device"),
    "two devices": (_mixed, "cpu and cuda:0"),
    "distributed": (_sharded, "before it is sharded"),
    "a forward on the instance": (_replaced, "replaced on the instance"),
    "in place": (lambda: nn.SiLU(inplace=True), "writes over its input"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone_with_the_reason(name):
    make, reason = LEFT_ALONE[name]
    model = nn.Sequential(make(), nn.LayerNorm(COLS))
    report = accelerate(model)
    assert paths(report.kept) == ["0"] and reason in report.kept[0].detail and paths(report.swapped) == ["1"]


def test_extra_state_is_kept():
    model = nn.Sequential(WithExtraState(COLS))
    model[0].count = 5
    accelerate(model)
    other = nn.Sequential(WithExtraState(COLS))
    other.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(other.state_dict(), strict=True)
    assert other[0].count == model[0].count == 5 and isinstance(model[0], WithExtraState)


def test_a_rule_that_raises_is_a_reason():
    class Mine(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x)

    def broken(module, x, backend):
        raise IndexError("no such row")

    @llmkernels.accelerate.rule(Mine)
    def mine(module):
        return [Candidate("rms_norm", "broken", (COLS,), broken), Candidate("rms_norm", "good", (COLS,), rms_norm)]

    try:
        report = accelerate(nn.Sequential(Mine(COLS)))
        assert report.swapped[0].replacement == "good"
    finally:
        del user_rules[Mine]
    with pytest.raises(TypeError, match="expected a subclass of torch.nn.Module"):
        llmkernels.accelerate.rule("LayerNorm")


# --- example inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", (lambda x: x, lambda x: (x,), lambda x: {"input": x}))
def test_example_inputs_compare_the_whole_model(call):
    model = model_of().train()
    grads = [p.grad for p in model.parameters()]
    report = accelerate(model, example_inputs=call(torch.randn(3, COLS)))
    assert len(report.swapped) == 5 and "outputs differ by" in report.whole and "gradients" in report.whole
    assert all(module.training for module in model.modules()) and [p.grad for p in model.parameters()] == grads
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_whole_model_that_disagrees_is_as_it_was():
    """A rule that agrees on generated rows alone is found out, by the module's or the model's own inputs."""

    class Mine(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x)

    def shaped(module, x, backend):
        y = rms_norm(module, x, backend)
        return y if x.shape[0] == 1 else 1.5 * y

    trials = lambda module, dtype, backend: []
    seen, unseen = (
        Candidate("rms_norm", "s", (COLS,), shaped),
        Candidate("rms_norm", "s", (COLS,), shaped, trials=trials),
    )
    x = torch.randn(3, COLS)
    try:
        user_rules[Mine] = lambda module: [seen]
        assert accelerate(nn.Sequential(Mine(COLS))).swapped
        report = accelerate(nn.Sequential(Mine(COLS)), example_inputs=x)
        assert "on the example inputs" in report.kept[0].detail
        user_rules[Mine] = lambda module: [unseen]
        model = nn.Sequential(nn.LayerNorm(COLS), Mine(COLS))
        before, expected = [type(module) for module in model.modules()], model(x)
        report = accelerate(model, example_inputs=x)
        assert not report.swapped and "nothing was swapped" in report.whole
        assert {entry.detail for entry in report.kept} == {"the whole model disagrees"}
        assert [type(module) for module in model.modules()] == before and torch.equal(model(x), expected)
    finally:
        del user_rules[Mine]


class OverwritesItself(nn.Module):
    """Has no backward: what that would need is overwritten."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(COLS), nn.Parameter(torch.ones(COLS))

    def forward(self, input):
        x = self.norm(input)
        y = x * self.scale
        x.add_(1.0)
        return y + x


def test_a_model_without_a_backward():
    report = accelerate(OverwritesItself(), example_inputs=torch.randn(3, COLS))
    assert len(report.swapped) == 1 and "it has no backward (one of the variables" in report.whole


class Padded(nn.Module):
    """Gives of padding another number each time."""

    def __init__(self):
        super().__init__()
        self.norm, self.count = nn.LayerNorm(COLS), 0.0

    def forward(self, x, attention_mask):
        self.count += 1.0
        return torch.where(attention_mask[..., None] == 1, self.norm(x), self.count)


def test_what_a_mask_hides_is_not_compared():
    x, mask = torch.randn(2, 3, COLS), torch.tensor([[1, 1, 1], [0, 1, 1]])
    report = accelerate(Padded(), example_inputs={"x": x, "attention_mask": mask})
    assert len(report.swapped) == 1, report.whole
    report = accelerate(Padded(), example_inputs=(x, mask))
    assert not report.swapped and "nothing was swapped" in report.whole


def test_example_inputs_that_are_none():
    with pytest.raises(TypeError, match="example_inputs is a list, expected a tensor"):
        accelerate(model_of(), example_inputs=[1])
    model = model_of()
    with pytest.raises(RuntimeError):
        accelerate(model, example_inputs=torch.randn(3, COLS + 1))
    assert llmkernels.restore(model) == 0


# --- benchmark ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", (None, torch.randn(4, COLS)))
@pytest.mark.parametrize("training", (True, False))
def test_benchmark_drops_what_is_slower(monkeypatch, training, given):
    calls = []

    def ratio(functions):
        for function in functions:
            function()
        calls.append(functions)
        return 1.5 if len(calls) == 1 else 0.5

    monkeypatch.setattr(timing, "ratio", ratio)
    report = accelerate(model_of().train(training), benchmark=True, example_inputs=given)
    assert len(calls) == 3, "modules that are alike are measured once"
    assert paths(report.swapped) == ["0.norm", "1.norm"] and report.swapped[0].speed == 1.5
    assert all(entry.detail == "measured, it is slower" and entry.speed == 0.5 for entry in report.kept)
    assert "1.50x" in str(report) and "0.50x" in str(report)


def test_the_ratio_of_times():
    spin = lambda seconds: lambda: [torch.ones(200, 200) @ torch.ones(200, 200) for _ in range(seconds)]
    assert timing.ratio((spin(12), spin(2))) > 1.5


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_report_in_every_form():
    model = nn.Sequential(*model_of(), nn.LayerNorm(COLS, device="meta"))
    report = accelerate(model)
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(report.to_dict())) and data["swapped"] == 5 and data["kept"] == 1
    first = data["entries"][0]
    assert (first["path"], first["module"], first["replacement"], first["backend"]) == (
        "0.norm", "LayerNorm", "layer_norm", "torch",
    )  # fmt: skip
    assert 0 < first["error"] < 1e-4 and "meta device" in data["entries"][-1]["detail"]
    text = str(report)
    assert text.startswith("accelerate: 5 swapped, 1 kept") and "0.norm and 1 more" in text and "meta device" in text
    page = report._repr_html_()
    assert page.count("<tr>") == 5 and page.startswith("<table><caption>accelerate: 5 swapped")
    with (console := rich.console.Console(width=200)).capture() as captured:
        console.print(report)
    assert all(word in captured.get() for word in ("5 swapped, 1 kept", "0.norm and 1 more", "memory: 5.5 kB of"))
    assert str(accelerate(nn.Linear(2, 2))) == (
        "accelerate: 0 swapped, 0 kept as they were\nmemory: 24 B of parameters and buffers, as before"
    )
    assert (
        data["memory"] == {"before": 5472, "after": 5472, "kept": 0} and data["dtype"] is data["quantization"] is None
    )


def test_json_has_no_infinity():
    entry = llmkernels.accelerate(nn.LayerNorm(4), backend="torch").entries[0]
    report = Report([dataclasses.replace(entry, swapped=False, error=float("inf"))])
    assert json.loads(report.to_json(), parse_constant=pytest.fail)["entries"][0]["error"] is None


def test_the_report_escapes_what_it_shows():
    model = nn.ModuleDict({"<b>": nn.LayerNorm(COLS)})
    assert "&lt;b&gt;" in accelerate(model)._repr_html_()
