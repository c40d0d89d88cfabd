"""AWQ and GPTQ: folders that an independent packer wrote (packers.py); wrong ones leave a model as it is."""

import json
import sys

import numpy
import pytest
import torch
from torch import nn

from llmkernels.nn import QuantizedLinear
from llmkernels.quantization import checkpoints
from tests.quantization import packers


class Tiny(nn.Module):
    """Names as Hugging Face's models have them; the head is tied to the table."""

    def __init__(self, tie=True):
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(32, 64),
                "q_proj": nn.Linear(64, 64, bias=True),
                "down_proj": nn.Linear(64, 64, bias=False),
                "norm": nn.RMSNorm(64),
            }
        )
        self.lm_head = nn.Linear(64, 32, bias=False)
        if tie:
            self.lm_head.weight = self.model["embed_tokens"].weight

    def forward(self, tokens):
        x = self.model["embed_tokens"](tokens)
        x = self.model["norm"](self.model["down_proj"](self.model["q_proj"](x)))
        return self.lm_head(x)


def tiny_files(folder, method, config=None, shards=1, seed=5, **options):
    """(the layers by path, all arrays) of a folder for Tiny."""
    random = numpy.random.default_rng(seed)
    layers = {
        "model.q_proj": packers.random_layer(seed, 64, 64, 32, bias=True, **options),
        "model.down_proj": packers.random_layer(seed + 1, 64, 64, 32, **options),
    }
    arrays = {"model.embed_tokens.weight": random.normal(size=(32, 64)).astype(numpy.float32)}
    arrays["model.norm.weight"] = random.normal(size=64).astype(numpy.float32)
    pack = packers.awq if method == "awq" else packers.gptq
    for path, layer in layers.items():
        arrays |= {f"{path}.{name}": array for name, array in pack(layer).items()}
    config = {"quant_method": method, "bits": 4, "group_size": 32} | (config or {})
    packers.write_folder(folder, arrays, config, shards)
    return layers, arrays


def truth_of(model, layers, arrays):
    """The same model with the weights that the files mean."""
    state = {name: torch.from_numpy(array) for name, array in arrays.items() if name.endswith("norm.weight")}
    state["model.embed_tokens.weight"] = state["lm_head.weight"] = torch.from_numpy(arrays["model.embed_tokens.weight"])
    for path, layer in layers.items():
        state[f"{path}.weight"] = torch.from_numpy(layer.weight()).float()
    state["model.q_proj.bias"] = torch.from_numpy(layers["model.q_proj"].bias)
    model.load_state_dict(state)
    return model


def means(ours, layer):
    """Whether the weight, and the bias, are exactly those of the file."""
    bias = None if layer.bias is None else torch.from_numpy(layer.bias)
    same = bias is None if ours.bias is None else torch.equal(ours.bias, bias)
    return same and torch.equal(ours.dequantize(torch.float64), torch.from_numpy(layer.weight()))


@pytest.mark.parametrize("method, options", (("awq", {}), ("gptq", {}), ("gptq", {"desc_act": True})))
@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize("shards", (1, 3))
def test_folders(tmp_path, method, options, device, shards):
    pytest.importorskip("safetensors")
    layers, arrays = tiny_files(tmp_path, method, options, shards, **options)
    with torch.device(device):
        model = Tiny()
    model.eval()
    assert checkpoints.load_pretrained(model, tmp_path) == ["model.down_proj", "model.q_proj"]
    assert type(model.model["q_proj"]) is QuantizedLinear and not model.model["q_proj"].training
    for path, layer in layers.items():
        assert means(model.get_submodule(path), layer)
    assert model.lm_head.weight is model.model["embed_tokens"].weight and not model.lm_head.weight.is_meta
    tokens = torch.tensor([[1, 5, 31]])
    torch.testing.assert_close(model(tokens), truth_of(Tiny(), layers, arrays)(tokens), rtol=1e-4, atol=1e-4)


def test_configs_of_other_years(tmp_path):
    """quantize_config.json beside config.json, AutoAWQ's older words, version 2, zeros as bias."""
    pytest.importorskip("safetensors")
    layers, arrays = tiny_files(tmp_path / "old", "gptq")
    (tmp_path / "old/config.json").write_text("{}")
    (tmp_path / "old/quantize_config.json").write_text('{"bits": 4, "group_size": 32, "desc_act": false}')
    arrays["model.down_proj.bias"] = numpy.zeros(64, numpy.float16)
    arrays["model.layers.0.rotary_emb.inv_freq"] = numpy.ones(4, numpy.float32)
    packers.write_safetensors(tmp_path / "old/model.safetensors", arrays)
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    awq_layers, _ = tiny_files(tmp_path / "awq", "awq")
    (tmp_path / "awq/config.json").write_text(json.dumps({"quantization_config": config}))
    second, arrays = tiny_files(tmp_path / "second", "gptq", {"checkpoint_format": "gptq_v2"})
    for path, layer in second.items():
        arrays |= {f"{path}.{name}": array for name, array in packers.gptq(layer, 2).items()}
    packers.write_safetensors(tmp_path / "second/model.safetensors", arrays)
    with pytest.raises(ValueError, match="the model has no model.layers.0.rotary_emb.inv_freq, which"):
        checkpoints.load_pretrained(Tiny(), tmp_path / "old", ignore=())
    for name, expected in (("old", layers), ("awq", awq_layers), ("second", second)):
        model = Tiny()
        checkpoints.load_pretrained(model, tmp_path / name)
        for path, layer in expected.items():
            assert means(model.get_submodule(path), layer)


def test_wrong_files_leave_the_model_as_it_is(tmp_path):
    pytest.importorskip("safetensors")
    model = Tiny()
    state, objects = {n: t.clone() for n, t in model.state_dict().items()}, [(id(m), type(m)) for m in model.modules()]

    def arrays_with(folder, *, without=(), **changed):
        _, arrays = tiny_files(folder, "gptq")
        arrays |= {name.replace("__", "."): value for name, value in changed.items()}
        packers.write_safetensors(
            folder / "model.safetensors", {name: value for name, value in arrays.items() if name not in without}
        )

    def truncated(folder):
        tiny_files(folder, "awq")
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def indexed(folder, document):
        tiny_files(folder, "awq", shards=2)
        (folder / "model.safetensors.index.json").write_text(document)

    nan = numpy.full((2, 64), numpy.nan, numpy.float16)
    cases = [
        ("no config.json in it", lambda f: f.mkdir()),
        ("config.json has no quantization_config", lambda f: (f.mkdir(), (f / "config.json").write_text("{}"))),
        ("config.json: no JSON that can be read", lambda f: (f.mkdir(), (f / "config.json").write_text("{"))),
        ("quant_method is 'fp8', expected", lambda f: tiny_files(f, "awq", {"quant_method": "fp8"})),
        ("bits is 8, expected 4", lambda f: tiny_files(f, "gptq", {"bits": 8})),
        ("group_size is 256, expected 32", lambda f: tiny_files(f, "gptq", {"group_size": 256})),
        ("version is 'gemv', expected 'gemm'", lambda f: tiny_files(f, "awq", {"version": "gemv"})),
        ("checkpoint_format is 'marlin'", lambda f: tiny_files(f, "gptq", {"checkpoint_format": "marlin"})),
        ("dynamic is .* expected none", lambda f: tiny_files(f, "gptq", {"dynamic": {"-:x": {}}})),
        ("scales has .2, 64., expected .1, 64.: groups of 64", lambda f: tiny_files(f, "awq", {"group_size": 64})),
        ("g_idx does not put 64 rows in each group", lambda f: tiny_files(f, "gptq", {"group_size": 64})),
        ("has zero points of .* expected 8: symmetric", lambda f: tiny_files(f, "gptq", {"sym": True})),
        # The one layout read as the other: shapes do not fit.
        ("down_proj: GPTQ: .*", lambda f: tiny_files(f, "awq", {"quant_method": "gptq"})),
        ("no safetensors file, or not all of one", truncated),
        ("no safetensors file, or not all of one",
         lambda f: (tiny_files(f, "awq"), (f / "model.safetensors").write_bytes(b"not a file at all"))),
        ("there is no .*safetensors in it", lambda f: (tiny_files(f, "awq"), (f / "model.safetensors").unlink())),
        ("there is no such file", lambda f: indexed(f, '{"weight_map": {"a": "gone.safetensors"}}')),
        ("names '../a.safetensors', expected a file of",
         lambda f: indexed(f, '{"weight_map": {"a": "../a.safetensors"}}')),
        ("has no weight_map", lambda f: indexed(f, "{}")),
        ("model.q_proj.*qzeros is missing", lambda f: arrays_with(f, without=("model.q_proj.qzeros",))),
        ("q_proj has a bias in the model, but none", lambda f: arrays_with(f, without=("model.q_proj.bias",))),
        ("the file has no model.norm.weight, which", lambda f: arrays_with(f, without=("model.norm.weight",))),
        ("the model has no model.extra, which the file", lambda f: arrays_with(f, model__extra=nan)),
        ("down_proj has a bias in the files, but none in",
         lambda f: arrays_with(f, model__down_proj__bias=numpy.ones(64, numpy.float16))),
        ("scales have a value that is not finite and above", lambda f: arrays_with(f, model__q_proj__scales=nan)),
        ("norm.weight has shape .3,. in the file, expected",
         lambda f: arrays_with(f, model__norm__weight=numpy.ones(3, numpy.float32))),
        ("g_idx does not put 32 rows in each group",
         lambda f: arrays_with(f, model__q_proj__g_idx=numpy.zeros(64, numpy.int32))),
        ("g_idx is torch.int32 .63,.", lambda f: arrays_with(f, model__q_proj__g_idx=numpy.zeros(63, numpy.int32))),
        ("qweight is torch.float32",
         lambda f: arrays_with(f, model__q_proj__qweight=numpy.ones((8, 64), numpy.float32))),
        ("in the files, expected .64, 64.",
         lambda f: arrays_with(f, **{f"model__q_proj__{name}": array for name, array in packers.gptq(
             packers.random_layer(9, 128, 64, 32, bias=True)).items()})),
        ("the model has no 'model.z', which is a quantized linear",
         lambda f: arrays_with(f, **{f"model__z__{name}": array for name, array in packers.gptq(
             packers.random_layer(9, 64, 64, 32)).items()})),
        ("no layer is packed: the files have no qweight",
         lambda f: (tiny_files(f, "awq"), packers.write_safetensors(f / "model.safetensors", {"a": nan}))),
    ]  # fmt: skip
    for number, (message, write) in enumerate(cases):
        folder = tmp_path / str(number)
        write(folder)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            checkpoints.load_pretrained(model, folder)
        assert [(id(m), type(m)) for m in model.modules()] == objects
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()), message
    assert model.lm_head.weight is model.model["embed_tokens"].weight
    tiny_files(tmp_path / "good", "gptq")
    assert len(checkpoints.load_pretrained(model, tmp_path / "good")) == 2


@pytest.mark.parametrize("method", ("awq", "gptq"))
def test_a_model_of_transformers(method, tmp_path):
    """A tiny Llama with a tied head: names, shapes and modules are those of real folders."""
    pytest.importorskip("safetensors")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=64, num_hidden_layers=2, max_position_embeddings=32, tie_word_embeddings=True, **sizes
    )
    truth, model = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    arrays, state = {}, {}
    for number, (name, tensor) in enumerate(truth.state_dict().items()):
        if name.endswith("_proj.weight"):
            path = name.removesuffix(".weight")
            layer = packers.random_layer(number, *tensor.shape[::-1], 32, desc_act=method == "gptq")
            arrays |= {f"{path}.{each}": array for each, array in getattr(packers, method)(layer).items()}
            state[name] = torch.from_numpy(layer.weight()).float()
        elif name != "lm_head.weight":
            arrays[name] = tensor.numpy().copy()
    packers.write_folder(tmp_path, arrays, {"quant_method": method, "bits": 4, "group_size": 32}, shards=2)
    truth.load_state_dict(state, strict=False)
    assert len(checkpoints.load_pretrained(model, tmp_path)) == 14
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, truth(tokens).logits, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_without_safetensors(monkeypatch, tmp_path):
    tiny_files(tmp_path, "awq")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match="checkpoints need safetensors: pip install safetensors"):
        checkpoints.load_pretrained(Tiny(), tmp_path)
