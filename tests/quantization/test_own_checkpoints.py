"""checkpoints.save and load: everything comes back bitwise, mapped from the file; wrong files change nothing."""

import copy
import json
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import llmkernels
from llmkernels.nn import QuantizedEmbedding, QuantizedLinear
from llmkernels.quantization import SCHEMES, checkpoints

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402


class Model(nn.Module):
    """Each kind of layer, a tied head, a shared module, a buffer."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.table = nn.Embedding(40, 128, padding_idx=2, dtype=dtype)
        self.positions = nn.Embedding(16, 128, dtype=dtype)
        self.up = nn.Linear(128, 200, dtype=dtype)
        self.down = nn.Linear(200, 128, bias=False, dtype=dtype)
        self.blocks = nn.ModuleList([nn.Linear(128, 128, dtype=dtype)] * 2)
        self.lstm = nn.LSTM(128, 64, proj_size=32, bidirectional=True, dtype=dtype)
        self.lm_head = nn.Linear(128, 40, bias=False, dtype=dtype)
        self.lm_head.weight = self.table.weight
        self.register_buffer("offset", torch.randn(128).to(dtype))
        self.register_buffer("scratch", torch.zeros(3, device="cpu"), persistent=False)

    def forward(self, tokens):
        x = self.table(tokens) + self.positions(torch.arange(tokens.shape[1]))
        x = self.down(self.up(x)) + self.offset
        for block in self.blocks:
            x = block(x)
        x = x + self.lstm(x)[0].repeat(1, 1, 2)
        return self.lm_head(x)


TOKENS = torch.tensor([[1, 5, 39]])


def make(scheme, **options):
    torch.manual_seed(0)
    model = Model().eval()
    filter = lambda path, module: path != "table"
    report = llmkernels.quantize(model, scheme, embeddings=True, lstms=scheme == "w8a8", filter=filter, **options)
    assert len(report.quantized) == 4 + (scheme == "w8a8")
    return model


@torch.no_grad()
@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_comes_back_bitwise(scheme, device, tmp_path):
    model, path = make(scheme), tmp_path / "model.safetensors"
    expected = model(TOKENS)
    checkpoints.save(model, path)
    with torch.device(device):
        again = Model().eval()
    checkpoints.load(again, path)
    assert torch.equal(again(TOKENS), expected) and str(again) == str(model)
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert all(first[name].dtype == second[name].dtype for name in first)
    assert again.lm_head.weight is again.table.weight and again.blocks[0] is again.blocks[1]
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    checkpoints.load(model, path)  # into one that is quantized already
    assert torch.equal(model(TOKENS), expected)
    checkpoints.save(again, path)  # over the file that it is mapped from
    third = Model().eval()
    checkpoints.load(third, path)
    assert torch.equal(third(TOKENS), expected) and sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


@torch.no_grad()
def test_options_of_formats_and_scaled_inputs(tmp_path):
    for scheme, options in (
        ("int4", {"group_size": 32, "symmetric": False, "scale_dtype": torch.float16}),
        ("int4", {"group_size": -1}),
        ("nf4", {"double": True}),
        ("fp8", {"group_size": 128}),
        ("w4a8", {"calibration": [(torch.randint(0, 40, (2, 16)),)]}),
    ):
        model, path = make(scheme, **options), tmp_path / "model.safetensors"
        if "calibration" in options:
            model.up.input_scale = torch.rand(128) + 0.5
        checkpoints.save(model, path)
        again = Model().eval()
        checkpoints.load(again, path)
        assert torch.equal(again(TOKENS), model(TOKENS)) and str(again) == str(model)


def test_ordered_columns_and_a_model_that_is_one_layer(tmp_path):
    linear = nn.Linear(64, 8, bias=False)
    made = QuantizedLinear(64, 8, False, "int4", group_size=32, ordered=True)
    state = QuantizedLinear.from_linear(linear, "int4", group_size=32).state_dict()
    made.load_state_dict({**state, "weight_order": torch.randperm(64)})
    checkpoints.save(made, tmp_path / "one.safetensors")
    again = nn.Linear(64, 8, bias=False, device="meta")
    checkpoints.load(again, tmp_path / "one.safetensors")
    x = torch.randn(3, 64)
    assert type(again) is QuantizedLinear and torch.equal(again(x), made(x))
    table = QuantizedEmbedding.from_embedding(nn.Embedding(9, 64, dtype=torch.bfloat16), "nf4")
    checkpoints.save(table, tmp_path / "table.safetensors")
    plain = nn.Embedding(9, 64, dtype=torch.bfloat16)
    checkpoints.load(plain, tmp_path / "table.safetensors")
    assert torch.equal(plain(torch.arange(9)), table(torch.arange(9))) and plain.dtype == torch.bfloat16


def test_files_are_mapped_and_others_can_read_them(tmp_path):
    model, path = make("int4"), tmp_path / "model.safetensors"
    checkpoints.save(model, path)
    tensors = load_file(path)
    assert torch.equal(tensors["up.weight"], model.up.weight) and tensors["up.weight"].dtype == torch.uint8
    assert "lm_head.weight" not in tensors and "blocks.1.weight" not in tensors and "scratch" not in tensors
    again = Model()
    checkpoints.load(again, path)
    maps = Path("/proc/self/maps")
    if maps.exists():
        addresses = [line.split()[0].split("-") for line in maps.read_text().splitlines() if path.name in line]
        spans = [(int(first, 16), int(last, 16)) for first, last in addresses]
        assert any(first <= again.up.weight.data_ptr() < last for first, last in spans)


def rewritten(path, change_tensors=lambda t: None, change=lambda d: None):
    """The file again, with other tensors or metadata."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors, document = load_file(path), json.loads(metadata["llmkernels"])
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change_tensors(tensors)
    change(document)
    save_file(tensors, path, metadata={**metadata, "llmkernels": json.dumps(document)})


def test_wrong_files_leave_the_model_as_it_is(tmp_path):
    source, path = make("int4", symmetric=False), tmp_path / "model.safetensors"
    model = Model()
    state, objects = {n: t.clone() for n, t in model.state_dict().items()}, [(id(m), type(m)) for m in model.modules()]
    layer = lambda document: document["layers"]["up"]

    def replaced(name, value):
        return lambda: rewritten(path, lambda tensors: tensors.update({name: value(tensors[name])}))

    def described(change):
        return lambda: rewritten(path, change=change)

    cases = [
        ("there is no such file", lambda: path.unlink()),
        ("no safetensors file, or not all of one", lambda: path.write_bytes(path.read_bytes()[:-10])),
        ("no safetensors file, or not all of one", lambda: path.write_bytes(b"")),
        ("no safetensors file, or not all of one", lambda: path.write_bytes(b"\xff" * 100)),
        ("llmkernels did not write it", lambda: save_file({"a": torch.ones(2)}, path)),
        ("is of version 2, expected up to 1: a newer", described(lambda d: d.update(version=2))),
        ("llmkernels did not write it", described(lambda d: d.pop("layers"))),
        ("'layers' is no description", described(lambda d: d.update(layers=[1]))),
        ("'tied' names tensors that are not there", described(lambda d: d.update(tied={"a": "b"}))),
        ("the file has no up.weight_zeros, which its metadata",
         lambda: rewritten(path, lambda tensors: tensors.pop("up.weight_zeros"))),
        ("the file has no offset, which the model", lambda: rewritten(path, lambda tensors: tensors.pop("offset"))),
        ("the model has no more, which the file", lambda: rewritten(path, lambda t: t.update(more=torch.ones(1)))),
        ("the model has no 'z', which is a quantized linear",
         described(lambda d: d["layers"].update(z=layer(d)))),
        ("positions is a Embedding in the model, but a quantized linear",
         described(lambda d: d["layers"]["positions"].update(kind="linear"))),
        ("up is of the kind 'conv', expected one of linear", described(lambda d: layer(d).update(kind="conv"))),
        ("up: scheme is 'int3', expected", described(lambda d: layer(d).update(scheme="int3"))),
        ("up: int4: group_size is 48, expected", described(lambda d: layer(d).update(group_size=48))),
        ("up: int4: data's scales: ", described(lambda d: layer(d).update(group_size=32))),
        ("up: int8: zeros is given, expected None",
         described(lambda d: layer(d).update(scheme="int8", group_size=None))),
        ("the model has no up.weight_zeros", described(lambda d: layer(d)["tensors"].remove("weight_zeros"))),
        ("up: it has no bias, the model's has one", described(lambda d: layer(d)["tensors"].remove("bias"))),
        ("up: it has bias, weight_scales, weight_zeros, expected", described(
            lambda d: layer(d)["tensors"].remove("weight"))),
        (r"up: int4: data: torch.uint8 \(200, 63\), expected", replaced("up.weight", lambda t: t[:, 1:].contiguous())),
        ("up's scales have a value that is not finite", replaced("up.weight_scales", lambda t: -t)),
        ("up's zeros have a 200, expected 0 to 16", replaced("up.weight_zeros", lambda t: t * 0 + 200)),
        (r"up: QuantizedLinear: bias has shape \(3,\), expected", replaced("up.bias", lambda t: t[:3].contiguous())),
        (r"offset has shape \(3,\) in the file, expected \(128,\)", replaced("offset", lambda t: t[:3].contiguous())),
    ]  # fmt: skip
    for message, spoil in cases:
        checkpoints.save(source, path)
        spoil()
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            checkpoints.load(model, path)
        assert [(id(m), type(m)) for m in model.modules()] == objects, message
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()), message
    checkpoints.save(source, path)
    source.up.input_scale = torch.full((128,), float("nan"))
    checkpoints.save(source, tmp_path / "scaled.safetensors")
    with pytest.raises(ValueError, match="up: QuantizedLinear: the input_scale of up has a NaN"):
        checkpoints.load(model, tmp_path / "scaled.safetensors")
    checkpoints.load(model, path)
    assert type(model.up) is QuantizedLinear


def test_spoiled_bytes_are_an_error_or_harmless(tmp_path):
    """Bytes of the header, where shapes, names and our metadata are: never another exception, never half a model."""
    source, path = make("int4"), tmp_path / "model.safetensors"
    checkpoints.save(source, path)
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    random, refused = numpy.random.default_rng(0), 0
    model = Model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(150):
        spoiled = bytearray(good)
        for place in random.integers(0, 8 + size, random.integers(1, 4)):
            spoiled[place] = random.integers(32, 127)
        path.write_bytes(bytes(spoiled))
        try:
            checkpoints.load(copy.deepcopy(model), path)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError):
                checkpoints.load(model, path)
            assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert refused > 75


def test_what_cannot_be_saved_or_placed_has_one_clear_message(tmp_path):
    path = tmp_path / "model.safetensors"

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            raise AssertionError

    class Overrides(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="save: _extra_state is a dict, expected a tensor"):
        checkpoints.save(Extra(3, 4), path)
    with pytest.raises(ValueError, match="save: weight is on the meta device"):
        checkpoints.save(nn.Linear(3, 4, device="meta"), path)
    assert not list(tmp_path.iterdir())
    checkpoints.save(QuantizedLinear(64, 8), path)
    with pytest.raises(ValueError, match="is a Overrides, which overrides forward"):
        checkpoints.load(Overrides(64, 8), path)
    broken = Model()
    checkpoints.save(make("int8"), path)
    broken.register_buffer("scratch", torch.zeros(3, device="meta"), persistent=False)
    with pytest.raises(ValueError, match="scratch is on the meta device and never saved: make it before"):
        checkpoints.load(broken, path)
