"""AWQ and GPTQ: layers that an independent packer wrote (packers.py) are read as they mean."""

import copy

import hypothesis
import numpy
import pytest
import torch
import torch.nn.functional as torch_functional
from hypothesis import strategies

from llmkernels.nn import QuantizedLinear
from llmkernels.quantization import checkpoints
from tests.quantization import packers

GROUPS = (32, 64, 128, -1)


def tensors_of(arrays, prefix=""):
    return {prefix + name: torch.from_numpy(array) for name, array in arrays.items()}


def check(ours, layer):
    """The weight is what the file means, exactly; so are outputs."""
    truth = torch.from_numpy(layer.weight())
    assert type(ours) is QuantizedLinear and (ours.out_features, ours.in_features) == truth.shape
    assert torch.equal(ours.dequantize(torch.float64), truth)
    x = torch.randn(3, truth.shape[1], dtype=torch.float64)
    bias = None if layer.bias is None else torch.from_numpy(layer.bias).double()
    torch.testing.assert_close(ours(x), torch_functional.linear(x, truth, bias))


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("group_size", GROUPS)
def test_awq_layers(group_size, symmetric):
    layer = packers.random_layer(0, 256, 24, group_size, symmetric=symmetric, bias=True, least_zero=0)
    ours = checkpoints.from_awq(tensors_of(packers.awq(layer), "up."), "up", group_size=group_size)
    check(ours, layer)
    assert ours.weight_scales.dtype == torch.float16 and (ours.weight_zeros is None) == symmetric
    assert ours.group_size == (None if group_size == -1 else group_size) and ours.scheme == "int4"


@pytest.mark.parametrize("version", (1, 2))
@pytest.mark.parametrize("desc_act", (False, True))
@pytest.mark.parametrize("group_size", GROUPS)
def test_gptq_layers(group_size, desc_act, version):
    """Version 1 has zero points of 1 to 16, of which 16 is stored as 15; version 2 has 0 to 15."""
    layer = packers.random_layer(1, 256, 24, group_size, desc_act=desc_act, bias=True, least_zero=2 - version)
    if version == 1:
        layer.zeros[0, :3] = 16
    arrays = packers.gptq(layer, version, g_idx=desc_act or group_size == 64)
    ours = checkpoints.from_gptq(tensors_of(arrays), group_size=group_size, version=version)
    check(ours, layer)
    assert (ours.weight_order is None) == (not desc_act or group_size == -1)


def test_gptq_symmetric_files():
    layer = packers.random_layer(2, 128, 16, 32, symmetric=True)
    for version, stored in ((1, 7), (2, 8)):
        arrays = packers.gptq(layer, version)
        assert (torch.from_numpy(arrays["qzeros"]) & 15 == stored).all()
        ours = checkpoints.from_gptq(tensors_of(arrays), group_size=32, version=version, symmetric=True)
        check(ours, layer)
        assert ours.weight_zeros is None
    # Files that are called version 1 and store 8.
    mislabelled = tensors_of(packers.gptq(layer, 2))
    check(checkpoints.from_gptq(mislabelled, group_size=32, version=1, symmetric=True), layer)
    shifted = checkpoints.from_gptq(mislabelled, group_size=32, version=1)
    assert (shifted.weight_zeros == 9).all()


def test_wrong_readings_are_seen():
    """The order of nibbles, the one of the zero points and the order of rows matter to the fixtures."""
    layer = packers.random_layer(3, 64, 16, 32, desc_act=True)
    truth, read = torch.from_numpy(layer.weight()), lambda arrays, **k: checkpoints.from_gptq(
        tensors_of(arrays), group_size=32, **k
    ).dequantize(torch.float64)  # fmt: skip
    arrays = packers.gptq(layer, 1)
    assert torch.equal(read(arrays), truth)
    assert not torch.equal(read(arrays, version=2), truth)
    straight = {**arrays, "g_idx": (numpy.arange(64) // 32).astype(numpy.int32)}
    assert not torch.equal(read(straight), truth)
    layer = packers.random_layer(3, 64, 16, 32)
    awq = packers.awq(layer)
    awq["qweight"] = packers._pack_columns(layer.codes, range(8))
    assert not torch.equal(checkpoints.from_awq(tensors_of(awq), group_size=32).dequantize(torch.float64), truth)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    words=strategies.integers(1, 12), columns=strategies.integers(1, 30), group_size=strategies.sampled_from(GROUPS),
    version=strategies.sampled_from((1, 2)), desc_act=strategies.booleans(), seed=strategies.integers(0, 999),
)  # fmt: skip
def test_gptq_layers_of_any_size(words, columns, group_size, version, desc_act, seed):
    """Outputs that are no multiple of 8, where the last word of zero points has room left; ragged groups."""
    layer = packers.random_layer(seed, 8 * words, columns, group_size, desc_act=desc_act)
    padded = copy.copy(layer)
    padded.zeros = numpy.pad(layer.zeros, ((0, 0), (0, -columns % 8)), constant_values=version == 1)
    check(
        checkpoints.from_gptq(tensors_of(packers.gptq(padded, version)), group_size=group_size, version=version), layer
    )


def test_groups_whose_scale_is_zero():
    layer = packers.random_layer(4, 64, 16, 32)
    layer.scales[1, 3] = 0.0
    for ours in (
        checkpoints.from_awq(tensors_of(packers.awq(layer)), group_size=32),
        checkpoints.from_gptq(tensors_of(packers.gptq(layer)), group_size=32),
    ):
        check(ours, layer)
        assert ours.weight_scales[3, 1] == 1.0


def test_layers_that_cannot_be_read_have_one_clear_message():
    layer = packers.random_layer(6, 64, 16, 32)
    good = tensors_of(packers.gptq(layer))
    read = lambda changed=None, **options: checkpoints.from_gptq(
        {**good, **(changed or {})}, **({"group_size": 32} | options)
    )
    wrong = [
        ("GPTQ: the layer: has 8 bits, expected 4", lambda: read(bits=8)),
        ("GPTQ: the layer: version is 3, expected 1 or 2", lambda: read(version=3)),
        ("AWQ: up: up.qweight is missing", lambda: checkpoints.from_awq(good, "up")),
        ("int4: group_size is 16, expected one of", lambda: checkpoints.from_awq(
            tensors_of(packers.awq(packers.random_layer(6, 64, 16, 16))), group_size=16)),
        ("scales has .2, 16., expected .1, 16.: groups of -1 in 64", lambda: read({"g_idx": None}, group_size=-1)),
        ("qzeros has .2, 8., expected .2, 16.", lambda: read({"qzeros": good["qzeros"][:, :1]})),
        (r"bias has shape \(3,\), expected \(16,\)", lambda: read({"bias": torch.ones(3)})),
        ("bias is torch.int64", lambda: read({"bias": torch.ones(16).long()})),
        ("qweight is torch.int32 .128,., expected", lambda: read({"qweight": good["qweight"].flatten()})),
    ]  # fmt: skip
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
