"""nn.QuantizedLinear and nn.QuantizedEmbedding: torch's modules with other weights, saved, converted, compiled."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as torch_functional

from llmkernels import functional, nn
from llmkernels.quantization import SCHEMES
from llmkernels.quantization.tensor import quantize_tensor
from tests.support import check_exported

# scheme, group_size, options
KINDS = [
    ("int8", None, {}),
    ("int4", None, {}),
    ("int4", -1, {"scale_dtype": torch.float32}),
    ("int4", 32, {"symmetric": False, "scale_dtype": torch.float16}),
    ("nf4", 128, {}),
    ("nf4", None, {"double": True}),
    ("fp8", None, {}),
    ("fp8", 128, {}),
    ("w8a8", None, {}),
    ("w4a8", 64, {"symmetric": False}),
    ("fp8_dynamic", None, {}),
]
TABLES = [kind for kind in KINDS if kind[0] in ("int8", "int4", "nf4", "fp8")]
name_of = lambda kind: "-".join([kind[0], str(kind[1]), *kind[2]])


def make(kind, in_features=72, out_features=20, bias=True, dtype=torch.float32):
    scheme, group_size, options = kind
    torch.manual_seed(1)
    linear = torch.nn.Linear(in_features, out_features, bias, dtype=dtype)
    return linear, nn.QuantizedLinear.from_linear(linear, scheme, group_size=group_size, **options)


def empty_like(kind, in_features=72, out_features=20, **more):
    scheme, group_size, options = kind
    return nn.QuantizedLinear(in_features, out_features, scheme=scheme, group_size=group_size, **options, **more)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_it_is_the_function_of_the_quantized_weight(kind):
    scheme, group_size, options = kind
    linear, ours = make(kind)
    if group_size is not None:
        options = options | {"group_size": None if group_size == -1 else group_size}
    weight = quantize_tensor(linear.weight, scheme, **options)
    x = torch.randn(2, 3, 72, requires_grad=True)
    y = ours(x)
    assert torch.equal(y, functional.quantized_linear(x, weight, linear.bias)) and y.shape == (2, 3, 20)
    assert (y - linear(x)).norm() / linear(x).norm() < 0.2
    dx, dbias = torch.autograd.grad(y.square().sum(), (x, ours.bias))
    torch.testing.assert_close(dx, 2 * y @ ours.dequantize())
    torch.testing.assert_close(dbias, 2 * y.sum((0, 1)))
    assert ours.bias is linear.bias and (ours.in_features, ours.out_features) == (72, 20)
    assert [name for name, _ in ours.named_parameters()] == ["bias"]
    assert ours.scheme == scheme and torch.equal(ours.quantized_weight.data, weight.data)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_state_dict_copies_and_pickles(kind):
    _, ours = make(kind)
    x = torch.randn(4, 72)
    expected, names = ours(x), set(ours.state_dict())
    assert {"weight", "weight_scales", "bias"} <= names
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again = empty_like(kind)
    assert not again.dequantize().any()  # zeros until something is loaded
    again.load_state_dict(loaded)
    with torch.device("meta"):
        meta = empty_like(kind)
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    meta.load_state_dict(loaded, assign=True)
    filled = empty_like(kind, device="meta").to_empty(device="cpu")
    filled.load_state_dict(loaded)
    for other in (again, meta, filled, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), expected) and set(other.state_dict()) == names and repr(other) == repr(ours)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_conversions_leave_the_weight_as_it_is(kind):
    _, ours = make(kind)
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    truth = ours(torch.ones(3, 72))
    for convert, dtype in (
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.to(torch.float64), torch.float64),
        (lambda m: m.to("cpu", torch.float32), torch.float32),
    ):
        convert(ours)
        assert ours.bias.dtype == dtype
        for name, buffer in ours.named_buffers():
            assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name]), name
        y = ours(torch.ones(3, 72, dtype=dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), truth, rtol=0.02, atol=0.03)
    meta = ours.half().to("meta")
    assert all(buffer.dtype == before[name].dtype for name, buffer in meta.named_buffers())


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_compile_fullgraph(kind):
    torch._dynamo.reset()
    _, ours = make(kind)
    x = torch.randn(5, 72, requires_grad=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x))
    (dx,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(ours(x).square().sum(), x)[0])


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[8]], ids=name_of)
def test_exported_programs_run_where_no_kernel_is(kind, tmp_path):
    _, ours = make(kind)
    x = torch.randn(4, 72)
    with torch.no_grad():
        check_exported(torch.export.export(ours, (x,)), "quantized_linear_fwd", (x,), ours(x), tmp_path)


def test_autocast_no_bias_and_odd_shapes():
    linear, ours = make(("int8", None, {}), 33, 7, bias=False)
    assert ours.bias is None and "bias" not in ours.state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(2, 33)).dtype == linear(torch.randn(2, 33)).dtype == torch.bfloat16
    assert ours(torch.randn(33)).shape == (7,) and ours(torch.randn(0, 33)).shape == (0, 7)
    assert not nn.QuantizedLinear.from_linear(linear.eval(), "int8").training


def test_order_and_scaled_input():
    """Columns that are stored in another order, and an input that is multiplied first."""
    weight, order, scale = torch.randn(9, 64), torch.randperm(64), torch.rand(64) + 0.5
    stored = quantize_tensor(weight[:, order], "int4", group_size=32)
    stored = type(stored)(**{**stored.__dict__, "order": order})
    ours = nn.QuantizedLinear.from_tensor(stored, torch.ones(9), scale)
    x = torch.randn(5, 64, requires_grad=True)
    torch.testing.assert_close(ours(x), torch_functional.linear(x, ours.dequantize(), ours.bias), rtol=1e-4, atol=1e-5)
    assert (ours.dequantize() / scale - weight).norm() / weight.norm() < 0.12
    torch.testing.assert_close(torch.autograd.grad(ours(x).sum(), x)[0], ours.dequantize().sum(0).expand(5, 64))
    again = nn.QuantizedLinear(64, 9, scheme="int4", group_size=32, ordered=True, scaled_input=True)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), ours(x)) and "scaled input" in repr(ours)
    again.half()
    assert again.input_scale.dtype == torch.float32 and again.weight_order.dtype == torch.int64
    with pytest.raises(ValueError, match="expected 64 columns"):
        ours(torch.randn(5, 1))
    with pytest.raises(TypeError, match="input has dtype torch.int64"):
        ours(torch.ones(5, 64).long())


def test_repr_says_what_it_is():
    assert repr(make(("int4", None, {}), 128, 32)[1]) == (
        "QuantizedLinear(in_features=128, out_features=32, bias=True, int4, groups of 64, 4.25 bits per weight)"
    )
    assert "fp8, groups of 128, 8.01 bits" in repr(make(("fp8", 128, {}), 128, 32)[1])
    assert "w8a8, 8.44 bits" in repr(make(("w8a8", None, {}))[1])
    table = nn.QuantizedEmbedding.from_embedding(torch.nn.Embedding(10, 64, padding_idx=-1), "nf4")
    assert repr(table) == "QuantizedEmbedding(10, 64, padding_idx=9, nf4, groups of 64, 4.25 bits per weight)"


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("kind", TABLES, ids=name_of)
def test_embedding_gives_the_rows_of_the_table(kind, dtype):
    scheme, group_size, options = kind
    embedding = torch.nn.Embedding(300, 200, padding_idx=3, dtype=dtype)
    ours = nn.QuantizedEmbedding.from_embedding(embedding, scheme, group_size=group_size, **options)
    index = torch.tensor([[0, 299, 3, 127], [128, 7, 7, 255]])
    rows = ours(index)
    assert rows.dtype == ours.dtype == dtype and rows.shape == (2, 4, 200)
    torch.testing.assert_close(rows, ours.dequantize(dtype)[index], rtol=1e-6, atol=1e-6)
    assert (rows - embedding(index)).norm() / embedding(index).norm() < 0.2
    assert torch.equal(ours(index.int()), rows) and ours(torch.tensor(5)).shape == (200,)
    assert ours(index[:0]).shape == (0, 4, 200) and ours.padding_idx == 3
    again = nn.QuantizedEmbedding(300, 200, 3, scheme, group_size=group_size, device="meta", dtype=dtype, **options)
    again.load_state_dict(ours.state_dict(), assign=True)
    assert torch.equal(again(index), rows) and torch.equal(copy.deepcopy(ours)(index), rows)
    assert torch.equal(pickle.loads(pickle.dumps(ours)).to("cpu")(index), rows)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(index), rows)
    assert ours.half()(index).dtype == torch.float16 and ours.weight_scales.dtype == again.weight_scales.dtype


def test_bad_input_has_one_clear_message():
    linear, ours = make(("int4", None, {}))
    from_linear, embedding = nn.QuantizedLinear.from_linear, torch.nn.Embedding(10, 64)
    nan = torch.nn.Linear(4, 4)
    with torch.no_grad():
        nan.weight[2, 1] = float("nan")
    from_embedding, table = nn.QuantizedEmbedding.from_embedding, nn.QuantizedEmbedding(10, 64)
    wrong = [
        (TypeError, "linear is a Embedding, expected a torch.nn.Linear", lambda: from_linear(embedding, "int8")),
        (ValueError, "scheme is 'int3', expected one of int8, int4", lambda: from_linear(linear, "int3")),
        (ValueError, "QuantizedLinear: scheme is 'q4_0'", lambda: nn.QuantizedLinear(3, 4, scheme="q4_0")),
        (ValueError, "int4: group_size is 48", lambda: from_linear(linear, "int4", group_size=48)),
        (ValueError, "nf4: group_size is 48", lambda: nn.QuantizedLinear(3, 4, scheme="nf4", group_size=48)),
        (TypeError, "int8: group_size=64 is given, but", lambda: from_linear(linear, "int8", group_size=64)),
        (TypeError, "int8: double=True is given, but", lambda: nn.QuantizedLinear(3, 4, double=True)),
        (ValueError, "int8: row 2 of up has a NaN", lambda: from_linear(nan, "int8", name="up")),
        (ValueError, "on the meta device", lambda: from_linear(torch.nn.Linear(3, 4, device="meta"), "int8")),
        (RuntimeError, "its weight is int4 and takes no gradient", lambda: ours.requires_grad_()),
        (ValueError, r"bias has shape \(3,\), expected \(20,\)",
         lambda: nn.QuantizedLinear.from_tensor(ours.quantized_weight, torch.ones(3))),
        (ValueError, r"input has shape \(2, 71\), expected 72 columns", lambda: ours(torch.ones(2, 71))),
        (TypeError, "embedding is a Linear, expected", lambda: from_embedding(linear, "int8")),
        (ValueError, "max_norm=1.0, expected None",
         lambda: from_embedding(torch.nn.Embedding(3, 4, max_norm=1.0), "int8")),
        (ValueError, "padding_idx is 10, expected one of 10", lambda: nn.QuantizedEmbedding(10, 4, 10)),
        (ValueError, "scheme is 'w8a8', expected one of int8, int4, nf4, fp8: it has no activations",
         lambda: from_embedding(embedding, "w8a8")),
        (TypeError, "input has dtype torch.float32, expected torch.int64", lambda: table(torch.ones(3))),
        (IndexError, "out of range", lambda: table(torch.tensor([10]))),
        (IndexError, "out of range", lambda: table(torch.tensor([-1]))),
    ]  # fmt: skip
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
    fp8 = nn.QuantizedLinear(4, 4, scheme="fp8")
    fp8.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="a gradient of the weight is asked for, but fp8 has none"):
        fp8(torch.ones(1, 4))


@pytest.mark.parametrize("strict", (True, False))
def test_wrong_state_dicts_are_refused_and_nothing_is_changed(strict):
    linear, ours = make(("int4", 32, {"symmetric": False}))
    good = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    changed = lambda **parts: {**good, **parts}
    wrong = [
        ("weight is torch.float32, expected torch.uint8: load it into a module", linear.state_dict()),
        (r"int4: data: torch.uint8 \(20, 35\), expected torch.uint8 \(20, 36\)",
         changed(weight=good["weight"][:, 1:])),
        ("data's scales: torch.float64", changed(weight_scales=good["weight_scales"].double())),
        ("weight_zeros is absent", {name: tensor for name, tensor in good.items() if name != "weight_zeros"}),
        ("weight_second_scales is given, expected none", changed(weight_second_scales=torch.ones(3))),
        ("int4: weight's scales have a value", changed(weight_scales=good["weight_scales"] * 0)),
        ("int4: weight's zeros have a 17, expected", changed(weight_zeros=good["weight_zeros"] * 0 + 17)),
        (r"bias has shape \(19,\), expected \(20,\)", changed(bias=good["bias"][1:])),
    ]  # fmt: skip
    for message, state in wrong:
        state = {name: tensor + 1 if name == "bias" else tensor for name, tensor in state.items()}
        with pytest.raises(ValueError, match=message):
            ours.load_state_dict(state, strict=strict)
        assert all(torch.equal(tensor, good[name]) for name, tensor in ours.state_dict().items())
    outer = torch.nn.Sequential(nn.QuantizedLinear(64, 4, scheme="int8", ordered=True))
    state = {name: tensor.clone() for name, tensor in outer.state_dict().items()}
    state["0.weight_order"][0] = 1
    with pytest.raises(ValueError, match="0.weight_order is no permutation"):
        outer.load_state_dict(state)
    outer = torch.nn.Sequential(nn.QuantizedLinear(64, 4, scaled_input=True))
    state = {**outer.state_dict(), "0.input_scale": torch.full((64,), float("inf"))}
    with pytest.raises(ValueError, match="the input_scale of 0.weight has a NaN or an infinity"):
        outer.load_state_dict(state)
    assert torch.equal(outer[0].input_scale, torch.ones(64))
    for scheme in SCHEMES:
        outer = torch.nn.Sequential(nn.QuantizedLinear(64, 4, scheme=scheme))
        state = outer.state_dict()
        state["0.weight_scales"] = state["0.weight_scales"] * float("nan")
        with pytest.raises(ValueError, match="0.weight's scales have a value that is not finite"):
            outer.load_state_dict(state)
