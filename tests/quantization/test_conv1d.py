"""transformers' Conv1D, the linear layer of GPT-2 with a weight `[in, out]`: quantized, restored, saved, calibrated."""

import copy

import pytest
import torch

import llmkernels
from llmkernels.nn import QuantizedLinear
from llmkernels.quantization import checkpoints
from llmkernels.quantization.tensor import quantize_tensor
from tests.quantization import packers

pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D

from tests import hf_models

GPT2 = hf_models.FAMILIES["gpt2"]
LAYERS = [
    f"transformer.h.{i}.{name}" for i in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
SCHEMES = ("int8", "int4", "nf4", "fp8", "w8a8", "w4a8")


@torch.no_grad()
def logits(model):
    return hf_models.output_of(model, GPT2.inputs())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gpt2_is_quantized_and_restored_bitwise(scheme):
    model = GPT2.make()
    objects = [(id(m), type(m)) for m in model.modules()]
    state, expected = copy.deepcopy(model.state_dict()), logits(model)
    report = llmkernels.quantize(model, scheme, keep_original=True)
    assert [layer.path for layer in report.quantized] == LAYERS
    assert {layer.module for layer in report.quantized} == {"Conv1D"} and "| Conv1D |" in str(report)
    layer = model.transformer.h[1].mlp.c_fc
    weight = quantize_tensor(state["transformer.h.1.mlp.c_fc.weight"].t(), scheme)
    assert type(layer) is QuantizedLinear and (layer.in_features, layer.out_features) == (32, 128)
    assert torch.equal(layer.quantized_weight.data.view(torch.uint8), weight.data.view(torch.uint8).contiguous())
    assert (
        layer.weight.is_contiguous() and report.layers[-2].path == LAYERS[-1] and 0.0 < report.layers[-2].error < 0.12
    )
    found = logits(model)
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.3
    assert llmkernels.restore(model) == len(LAYERS)
    assert [(id(m), type(m)) for m in model.modules()] == objects
    now = model.state_dict()
    assert list(now) == list(state) and all(torch.equal(now[name], state[name]) for name in state)
    assert torch.equal(logits(model), expected)


def test_what_it_computes_and_its_gradients():
    torch.manual_seed(0)
    plain = Conv1D(24, 40)
    torch.nn.init.normal_(plain.bias)
    layer = copy.deepcopy(plain)
    llmkernels.quantize(layer, "int8")
    x = torch.randn(3, 5, 40, requires_grad=True)
    torch.testing.assert_close(layer(x), plain(x), rtol=0.05, atol=0.01)
    exact = copy.deepcopy(plain)
    exact.weight = torch.nn.Parameter(layer.dequantize().t())
    torch.testing.assert_close(layer(x), exact(x), rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(each(x).square().sum(), (x, each.bias)) for each in (layer, exact))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_bitwise(tmp_path):
    pytest.importorskip("safetensors")
    model = GPT2.make()
    llmkernels.quantize(model, "int4", group_size=32)
    expected = logits(model)
    checkpoints.save_folder(model, tmp_path / "folder")
    again = checkpoints.load_folder(tmp_path / "folder", accelerated=False)
    assert torch.equal(logits(again), expected) and type(again.transformer.h[0].attn.c_attn) is QuantizedLinear
    checkpoints.save(model, tmp_path / "model.safetensors")
    plain = GPT2.make()
    checkpoints.load(plain, tmp_path / "model.safetensors")
    assert torch.equal(logits(plain), expected)
    quantized = GPT2.make()
    llmkernels.quantize(quantized, "int4", group_size=32)
    quantized.load_state_dict(model.state_dict())
    assert torch.equal(logits(quantized), expected)
    wider = type(model)(type(model.config)(**{**GPT2.options, "n_inner": 96}))
    with pytest.raises(ValueError, match=r"h.0.mlp.c_fc.*expected"):
        checkpoints.load(wider, tmp_path / "model.safetensors")


def test_a_gptq_folder(tmp_path):
    """The packed matrix is `[in, out]` whatever the layer it came from stored."""
    pytest.importorskip("safetensors")
    truth, model = (GPT2.make() for _ in range(2))
    arrays, state = {}, {}
    for number, (name, tensor) in enumerate(truth.state_dict().items()):
        if name.removesuffix(".weight") in LAYERS:
            path = name.removesuffix(".weight")
            layer = packers.random_layer(number, *tensor.shape, 32)
            packed = packers.gptq(layer)
            packed["bias"] = truth.state_dict()[f"{path}.bias"].numpy().copy()
            arrays |= {f"{path}.{each}": array for each, array in packed.items()}
            state[name] = torch.from_numpy(layer.weight()).float().t().contiguous()
        elif name != "lm_head.weight" and name.removesuffix(".bias") not in LAYERS:
            arrays[name] = tensor.numpy().copy()
    packers.write_folder(tmp_path, arrays, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    truth.load_state_dict(state, strict=False)
    assert checkpoints.load_pretrained(model, tmp_path) == sorted(LAYERS)
    torch.testing.assert_close(logits(model), logits(truth), rtol=1e-4, atol=1e-4)


def test_calibration_and_what_is_left_alone():
    model = GPT2.make()
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight[::7] *= 30.0  # columns of c_attn's input
    report = llmkernels.quantize(model, "w8a8", calibration=[GPT2.inputs()], skip=("lm_head", "h.1.mlp"))
    layers = {layer.path: layer for layer in report.layers}
    without, found = layers["transformer.h.0.attn.c_attn"].output_error
    assert found < 0.8 * without and layers["transformer.h.1.mlp.c_fc"].detail == "skip names 'h.1.mlp'"

    class Doubled(Conv1D):
        def forward(self, x):
            return 2.0 * super().forward(x)

    assert llmkernels.quantize(Doubled(8, 8), "int8").skipped[0].detail == "Doubled overrides forward"
    broken = Conv1D(8, 16)
    with torch.no_grad():
        broken.weight[3, 5] = float("nan")  # input 3 of output 5
    with pytest.raises(ValueError, match="row 5 of weight has a NaN"):
        llmkernels.quantize(broken, "int8")
    assert type(broken) is Conv1D
