"""quantize(model, calibration=...): the errors of outputs fall, on data that was not seen too."""

import copy

import pytest
import torch
from torch import nn

import llmkernels


@pytest.mark.parametrize("scheme, gain", (("int4", 0.75), ("nf4", 0.75), ("w4a8", 0.75), ("w8a8", 0.75)))
def test_calibration_lowers_the_error_of_outputs(scheme, gain):
    """Inputs with a few large columns, as those of language models have."""
    generator = torch.Generator().manual_seed(3)
    size = torch.ones(256)
    size[::37] = 30.0
    draw = lambda: torch.randn(4, 50, 256, generator=generator) * size
    torch.manual_seed(4)
    layer = nn.Linear(256, 128).requires_grad_(False)
    nn.init.normal_(layer.weight)
    first, second, fresh = draw(), draw(), draw()
    errors = {}
    for name, calibration in (("plain", None), ("scaled", [first, (second,), {"input": first}])):
        model = copy.deepcopy(layer)
        report = llmkernels.quantize(model, scheme, calibration=calibration)
        errors[name] = float((model(fresh) - layer(fresh)).norm() / layer(fresh).norm())
    before, after = report.quantized[0].output_error
    assert before == pytest.approx(errors["plain"], rel=0.05) and after == pytest.approx(errors["scaled"], rel=0.05)
    assert errors["scaled"] < gain * errors["plain"] and model.input_scale is not None
    assert "outputs: " in str(report)
    torch.testing.assert_close(model.bias, layer.bias)


def test_calibration_without_a_gain_and_layers_it_does_not_reach():
    torch.manual_seed(5)
    model = nn.ModuleDict({"used": nn.Linear(256, 128), "unused": nn.Linear(256, 128)}).train()
    model.forward = lambda x: model["used"](x)
    report = llmkernels.quantize(model, "int8", calibration=[torch.randn(300, 256)])
    assert model["used"].input_scale is None and model.training and model["used"].training
    used, unused = report.quantized
    assert used.output_error[0] == used.output_error[1] and unused.output_error is None
    calls = []
    for batches, message in (
        ([], "calibration has no batch"),
        ([torch.full((1, 256), float("nan"))], "calibration gives used an input with a NaN"),
        (({"x": 3} for _ in ()), "calibration has no batch"),
    ):
        fresh = nn.ModuleDict({"used": nn.Linear(256, 128)})
        fresh.forward = lambda x, fresh=fresh: calls.append(1) or fresh["used"](x)
        with pytest.raises(ValueError, match=message):
            llmkernels.quantize(fresh, "int8", calibration=batches)
        assert type(fresh["used"]) is nn.Linear and not fresh["used"]._forward_pre_hooks
    idle = nn.Sequential(nn.Linear(256, 128))
    idle.forward = lambda x: x
    with pytest.raises(ValueError, match="calibration calls none of the 1 layers"):
        llmkernels.quantize(idle, "int8", calibration=[torch.randn(3, 256)])
