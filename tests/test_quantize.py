"""quantize(model): what is chosen, what is left alone and why, all or nothing, calibration, restore."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import llmkernels
from llmkernels.demo.model import LanguageModel
from llmkernels.nn import QuantizedEmbedding, QuantizedLinear, QuantizedLSTM
from llmkernels.quantization import FORMATS, SCHEMES
from llmkernels.quantization.tensor import quantize_tensor
from tests.tree import ROOT

TOKENS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def make(seed=0):
    torch.manual_seed(seed)
    return LanguageModel(64, 2, 4, 32)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, state):
    now = model.state_dict()
    return set(now) == set(state) and all(torch.equal(now[name], state[name]) for name in state)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_linear_is_quantized_and_restored_bitwise(scheme):
    model = make()
    expected, state, objects = model(TOKENS), state_of(model), [(id(m), type(m)) for m in model.modules()]
    report = llmkernels.quantize(model, scheme, keep_original=True)
    assert [id(m) for m in model.modules()] == [id_ for id_, _ in objects]
    assert len(report.quantized) == 9 and not [m for m in model.modules() if type(m) is nn.Linear]
    up = model.blocks[1].up
    weight = quantize_tensor(state["blocks.1.up.weight"], scheme)
    assert type(up) is QuantizedLinear and torch.equal(up.quantized_weight.data, weight.data)
    assert (up.scheme, up.quantized_weight.activations) == (scheme, SCHEMES[scheme][1])
    found = model(TOKENS)
    error = (found - expected).norm() / expected.norm()
    assert 1e-4 < error < (0.3 if "4" in scheme else 0.08)
    assert llmkernels.restore(model) == 9 and llmkernels.restore(model) == 0
    assert [(id(m), type(m)) for m in model.modules()] == objects and same(model, state)
    assert torch.equal(model(TOKENS), expected)


def test_the_report_says_what_was_done():
    model = make()
    before = sum(t.nbytes for t in model.state_dict().values())
    report = llmkernels.quantize(model, "int4", group_size=32, skip=("blocks.0.up", "head"), embeddings=True)
    after = sum(t.nbytes for t in model.state_dict().values())
    assert (report.bytes_before, report.bytes_after) == (before, after) and after < 0.4 * before
    layers = {layer.path: layer for layer in report.layers}
    assert list(layers)[:3] == ["bytes", "positions", "blocks.0.qkv"] and len(layers) == 11
    qkv = layers["blocks.0.qkv"]
    assert qkv.quantized and qkv.module == "Linear" and qkv.detail == "int4, groups of 32, 4.50 bits per weight"
    assert 0.08 < qkv.error < 0.1 and (qkv.bytes_before, qkv.bytes_after) == (4 * 64 * 192, 192 * 36)
    assert layers["bytes"].quantized and type(model.bytes) is QuantizedEmbedding
    assert layers["head"].detail == "skip names 'head'" and layers["blocks.0.up"].detail == "skip names 'blocks.0.up'"
    assert type(model.blocks[0].up) is nn.Linear and type(model.blocks[1].up) is QuantizedLinear
    text = str(report)
    assert "quantize: 9 layers in int4, 2 left as they were; the model: 5" in text and "blocks.1.down | Linear" in text
    numbers = report.to_dict()
    assert numbers["quantized"] == 9 and numbers["skipped"] == 2 and len(numbers["layers"]) == 11
    assert report.__rich__().row_count == 11
    again = llmkernels.quantize(model, "int8", skip=("blocks.0",))
    reasons = {layer.path: layer.detail for layer in again.skipped}
    assert reasons["blocks.1.down"] == "quantized before" and reasons["blocks.0.up"] == "skip names 'blocks.0'"
    assert [layer.path for layer in again.quantized] == ["head"]


class Overrides(nn.Linear):
    def forward(self, input):
        return 2.0 * super().forward(input)


class Plain(nn.Linear):
    pass


class Odd(nn.Module):
    """Everything that must be left as it is, and two that need not."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.lm_head = nn.Linear(16, 20, bias=False)
        self.tied = nn.Linear(16, 20, bias=False)
        self.tied.weight = self.table.weight
        self.overrides, self.plain = Overrides(16, 16), Plain(16, 16)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.pruned = prune.identity(nn.Linear(16, 16), "weight")
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.meta = nn.Linear(16, 16, device="meta")
        self.bytes8 = nn.Linear(16, 16)
        self.bytes8.weight = nn.Parameter(self.bytes8.weight.to(torch.float8_e4m3fn), requires_grad=False)
        self.patched = nn.Linear(16, 16)
        self.patched.forward = lambda x: x
        self.limited = nn.Embedding(20, 16, max_norm=1.0)
        self.lazy = nn.LazyLinear(16)
        self.named_by_filter = nn.Linear(16, 16)


def test_what_is_left_alone_has_a_reason():
    model = Odd()
    report = llmkernels.quantize(model, "int8", embeddings=True, filter=lambda path, module: "filter" not in path)
    reasons = {layer.path: layer.detail for layer in report.skipped}
    assert [layer.path for layer in report.quantized] == ["plain"] and type(model.plain) is QuantizedLinear
    assert reasons == {
        "table": "its weight is also tied.weight",
        "lm_head": "skip names 'lm_head'",
        "tied": "its weight is also table.weight",
        "overrides": "Overrides overrides forward",
        "parametrized": "its weight is parametrized",
        "pruned": "its weight is no parameter: something computes it",
        "attention.out_proj": "MultiheadAttention reads its weight itself",
        "encoder.self_attn.out_proj": "MultiheadAttention reads its weight itself",
        "encoder.linear1": "TransformerEncoderLayer reads its weight itself",
        "encoder.linear2": "TransformerEncoderLayer reads its weight itself",
        "meta": "it is on the meta device",
        "bytes8": "its weight is torch.float8_e4m3fn",
        "patched": "Linear overrides forward",
        "limited": "it has max_norm, which changes the weight",
        "lazy": "its weight is a UninitializedParameter",
        "named_by_filter": "filter returned False",
    }
    model.encoder.eval()(torch.randn(1, 3, 16))  # torch's fast path still has its weights


def test_shared_modules_views_and_a_model_that_is_one_layer():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    expected = model(torch.ones(1, 16))
    report = llmkernels.quantize(model, "int8")
    assert [layer.path for layer in report.quantized] == ["0"] and model[0] is model[2] is shared
    torch.testing.assert_close(model(torch.ones(1, 16)), expected, rtol=0.05, atol=0.02)
    second = nn.Linear(16, 16)
    named = nn.ModuleDict({"a": second, "lm_head": second})
    assert llmkernels.quantize(named, "int8").skipped[0].detail == "skip names 'lm_head'"
    read = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2)})
    read = nn.ModuleDict({"first": read["a"].out_proj, "a": read["a"]})
    assert llmkernels.quantize(read, "int8").skipped[0].detail == "MultiheadAttention reads its weight itself"
    both = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    both[1].weight = nn.Parameter(both[0].weight.detach()[:8])  # a view: what one does the other sees
    assert not llmkernels.quantize(both, "int8").quantized
    one = nn.Linear(8, 4)
    assert llmkernels.quantize(one, "nf4").quantized[0].path == "" and type(one) is QuantizedLinear
    assert "(the model itself)" in str(llmkernels.quantize(nn.Linear(8, 4), "nf4"))
    assert not llmkernels.quantize(nn.ReLU(), "int8").layers


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_all_or_nothing(value):
    model = make()
    with torch.no_grad():
        model.head.weight[7, 3] = value
    state, types = state_of(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="int4: row 7 of head.weight has a NaN or an infinity"):
        llmkernels.quantize(model, "int4")
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(model.state_dict()[n].isfinite(), t.isfinite()) for n, t in state.items())
    assert llmkernels.quantize(model, "int4", skip=("head",)).quantized


def test_hooks_attributes_and_mode_stay():
    model, calls = make().eval(), []
    layer = model.blocks[0].up
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    layer.note = "mine"
    llmkernels.quantize(model, "int8", keep_original=True)
    model(TOKENS)
    assert calls == [1] and layer.note == "mine" and not layer.training
    handle.remove()
    model(TOKENS)
    assert calls == [1]
    model.train()
    llmkernels.restore(model)
    assert layer.training and layer.note == "mine" and type(layer) is nn.Linear


def test_restore_follows_conversions_and_the_bias():
    model = make()
    state = state_of(model)
    llmkernels.quantize(model, "w8a8", keep_original=True)
    with torch.no_grad():
        model.blocks[0].up.bias.add_(1.0)
    duplicate, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert not any("_original" in name for name in model.state_dict())
    for each in (duplicate, pickled, model.bfloat16()):
        llmkernels.restore(each)
        dtype = next(each.parameters()).dtype
        assert all(p.dtype == dtype for p in each.parameters())
        for name, tensor in each.state_dict().items():
            expected = state[name] + 1.0 if name == "blocks.0.up.bias" else state[name]
            assert torch.equal(tensor, expected.to(dtype)), name
    assert next(model.parameters()).dtype == torch.bfloat16
    assert model(TOKENS).dtype == torch.bfloat16
    without = make()
    llmkernels.quantize(without, "w8a8")
    assert llmkernels.restore(without) == 0 and type(without.head) is QuantizedLinear


def test_restore_undoes_accelerate_too():
    model = make()
    types = [type(m) for m in model.modules()]
    llmkernels.accelerate(model, backend="torch")
    llmkernels.quantize(model, "int8", keep_original=True)
    assert llmkernels.restore(model) == 9 + 7 and [type(m) for m in model.modules()] == types


def test_lstms():
    model = nn.ModuleDict({"a": nn.LSTM(8, 12, 2), "b": llmkernels.nn.LSTM(8, 12), "c": nn.LSTM(8, 12, proj_size=4),
                           "z": llmkernels.nn.LSTM(8, 12, zoneout=0.1)}).eval()  # fmt: skip
    x, state = torch.randn(5, 3, 8), state_of(model)
    expected = {name: model[name](x)[0] for name in model}
    report = llmkernels.quantize(model, "w8a8", lstms=True, keep_original=True)
    assert [layer.path for layer in report.quantized] == ["a", "b", "c"] and type(model["a"]) is QuantizedLSTM
    assert {layer.path: layer.detail for layer in report.skipped} == {"z": "QuantizedLSTM has no zoneout"}
    assert all(0.002 < layer.error < 0.01 and layer.bytes_after < layer.bytes_before / 2 for layer in report.quantized)
    with torch.no_grad():
        for name in "abc":
            torch.testing.assert_close(model[name](x)[0], expected[name], rtol=0, atol=0.03)
    assert llmkernels.restore(model.half()) == 3
    assert all(p.dtype == torch.float16 for p in model.parameters()) and type(model["b"]) is llmkernels.nn.LSTM
    model.float()
    for name in "abcz":
        torch.testing.assert_close(model[name](x)[0], expected[name], rtol=0, atol=2e-3)
    assert set(model.state_dict()) == set(state)
    assert llmkernels.quantize(model, "w8a8").skipped[0].detail == "lstms=False"
    with torch.no_grad():
        model["c"].weight_hh_l0[5, 1] = float("nan")
    with pytest.raises(ValueError, match="quantize: c: int8: row 5 of weight_hh_l0 has a NaN"):
        llmkernels.quantize(model, "w8a8", lstms=True)
    assert type(model["a"]) is nn.LSTM


@pytest.mark.parametrize("page, count", (("quantize", 4), ("quantized-linear", 2)))
def test_python_code_in_the_pages_runs(page, count):
    pytest.importorskip("safetensors")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL)
    assert len(blocks) == count
    for block in blocks:
        exec(compile(block, f"docs/{page}.md", "exec"), {})


def test_docs_name_every_scheme_and_format():
    page, formats = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("quantize", "quantization-formats"))
    assert all(f'| `"{scheme}"` |' in page for scheme in SCHEMES)
    assert all(f"(../llmkernels/quantization/{name}.py)" in formats for name in FORMATS)
    for link in re.findall(r"\]\((\.\./[^)]+)\)", page + formats):
        assert (ROOT / "docs" / link).exists(), link


def test_the_progress_bar(capsys):
    llmkernels.quantize(make(), "int8", progress=True)
    assert "int8" in capsys.readouterr().err
    llmkernels.quantize(make(), "int8")
    assert capsys.readouterr().err == ""


def test_bad_input_has_one_clear_message():
    model = make()
    quantize = llmkernels.quantize
    state = state_of(model)
    wrong = [
        (TypeError, "quantize: model is a Tensor, expected a torch.nn.Module", lambda: quantize(torch.ones(3), "int8")),
        (ValueError, "scheme is 'int3', expected one of int8, int4", lambda: quantize(model, "int3")),
        (ValueError, "int4: group_size is 48", lambda: quantize(model, "int4", group_size=48)),
        (TypeError, "int8: group_size=64 is given, but", lambda: quantize(model, "int8", group_size=64)),
        (TypeError, "nf4: symmetric=False is given, but", lambda: quantize(model, "nf4", symmetric=False)),
        (TypeError, "quantize: skip is 'head', expected a tuple", lambda: quantize(model, "int8", skip="head")),
        (ValueError, "quantize: skip names 'haed', but the model has no",
         lambda: quantize(model, "int8", skip=("haed",))),
        (ValueError, "lstms=True with scheme 'int8', expected 'w8a8'", lambda: quantize(model, "int8", lstms=True)),
    ]  # fmt: skip
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
    assert same(model, state) and type(model.head) is nn.Linear
