"""rope as part of torch: in place under autograd, transforms, ops, export, other tables, errors, the module."""

import importlib

import pytest
import torch

import llmkernels
from llmkernels import functional, nn
from llmkernels.ops.rope import cases
from llmkernels.ops.rope.cases import RopeCase
from llmkernels.testing.inputs import short_name
from tests.support import check_exported


def _inputs(device="cpu", **options):
    return cases.make_inputs(RopeCase("rope", (2, 3, 5, 16), kv_heads=2, **options), device)


def _call(inputs, **options):
    return functional.rope(inputs.q, inputs.k, inputs.cos, inputs.sin, inputs.positions, **options)


# In place.


def test_in_place_returns_its_arguments(backend, device):
    inputs = _inputs(device)
    expected = _call(inputs, backend=backend)
    q, k = inputs.q.clone(), inputs.k.clone()
    returned = functional.rope(q, k, inputs.cos, inputs.sin, inplace=True, backend=backend)
    assert returned[0] is q and returned[1] is k
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


def test_in_place_on_parts_of_one_projection(backend, device, poison):
    """q and k are views of what a layer's one matmul gives; the third part, v, stays."""
    x = torch.randn(2, 5, 3 * 4 * 16, device=device)
    cos, sin = _inputs(device).cos, _inputs(device).sin
    dy = torch.randn_like(x)

    def run(weight, inplace):
        qkv = (x * weight).view(2, 5, 3, 4, 16)
        q, k = qkv[:, :, 0], qkv[:, :, 1]
        if not inplace:
            q, k = functional.rope(q, k, cos, sin, seq_dim=-3, backend=backend)
            return torch.stack((q, k, qkv[:, :, 2]), 2).flatten(2)
        functional.rope(q, k, cos, sin, inplace=True, seq_dim=-3, backend=backend)
        return qkv.flatten(2)

    weights = [torch.full((192,), 2.0, device=device, requires_grad=True) for _ in range(2)]
    results = [run(weight, inplace) for weight, inplace in zip(weights, (False, True), strict=True)]
    assert torch.equal(*results)
    grads = [torch.autograd.grad(y, w, dy)[0] for y, w in zip(results, weights, strict=True)]
    torch.testing.assert_close(*grads)


def test_in_place_on_a_leaf_or_an_expanded_tensor_is_an_error(backend, device):
    inputs = _inputs(device)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        _call(inputs.requiring_grad(), inplace=True, backend=backend)
    with pytest.raises(ValueError, match="rope: k is expanded, expected memory of its own"):
        functional.rope_(inputs.q, inputs.k[:, :1].expand(2, 3, 5, 16), inputs.cos, inputs.sin, backend=backend)


def test_in_place_is_seen_by_autograd(backend, device):
    """A tensor saved for another backward and then overwritten is an error, not a wrong gradient."""
    inputs = _inputs(device).requiring_grad()
    q = inputs.q * 1.0
    squared = q * q
    functional.rope_(q, None, inputs.cos, inputs.sin, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


def test_memory_of_results_follows_the_arguments(backend, device):
    """[B, S, H, D] seen as [B, H, S, D] gives the same: attention then needs no copy either."""
    q = torch.randn(2, 5, 3, 16, device=device).transpose(1, 2)
    inputs = _inputs(device)
    if backend != "torch":
        assert functional.rope(q, None, inputs.cos, inputs.sin, backend=backend)[0].stride() == q.stride()


# Other gradients, and torch's transforms.


@pytest.mark.parametrize("positions", ("", "2d"))
def test_tables_have_gradients_from_plain_torch(positions):
    inputs = cases.make_inputs(RopeCase("rope", (2, 2, 3, 4), torch.float64, positions=positions))
    tensors = [tensor.requires_grad_() for tensor in (inputs.q, inputs.k, inputs.cos, inputs.sin)]
    function = lambda *tensors: functional.rope(*tensors, inputs.positions)
    assert torch.autograd.gradcheck(function, tensors)
    assert llmkernels.explain("rope", *tensors, inputs.positions).chosen == "torch"
    for inplace in (False, True):
        with pytest.raises(llmkernels.NoBackendError, match="cpu: .*cos or sin requires a gradient"):
            functional.rope(*tensors, inputs.positions, inplace=inplace, backend="cpu")
    q, k = tensors[0] * 1.0, tensors[1] * 1.0
    functional.rope_(q, k, *tensors[2:], inputs.positions)
    assert torch.autograd.grad(q.sum() + k.sum(), tensors)[2].abs().sum() > 0


@pytest.mark.parametrize("interleaved", (False, True))
def test_functorch(interleaved):
    inputs = _inputs()
    ours = lambda q, k: functional.rope(q, k, inputs.cos, inputs.sin, interleaved=interleaved)
    case = RopeCase("rope", (2, 3, 5, 16), kv_heads=2, interleaved=interleaved)
    theirs = lambda q, k: cases.call_torch(case, inputs.replace(q=q, k=k))
    tensors, tangents = (inputs.q, inputs.k), (inputs.dq_turned, inputs.dk_turned)
    transforms = {
        "grad": lambda f: torch.func.grad(lambda q, k: sum(y.cos().sum() for y in f(q, k)), (0, 1))(*tensors),
        "vmap": lambda f: torch.func.vmap(f)(*(tensor.unsqueeze(1) for tensor in tensors)),
        "jvp": lambda f: torch.func.jvp(f, tensors, tangents),
        "hessian": lambda f: torch.func.hessian(lambda q: f(q, tensors[1])[0].cos().sum())(tensors[0]),
    }
    for name, transform in transforms.items():
        torch.testing.assert_close(transform(ours), transform(theirs), msg=lambda m, name=name: f"{name}: {m}")


def test_functorch_in_place():
    inputs = _inputs()

    def loss(q):
        q = q * 1.0
        functional.rope_(q, None, inputs.cos, inputs.sin)
        return (q * inputs.dq_turned).sum()

    expected = functional.rope(inputs.dq_turned, None, inputs.cos, -inputs.sin)[0]
    torch.testing.assert_close(torch.func.grad(loss)(inputs.q), expected)


def test_positions_in_a_compiled_graph(backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("triton: an interpreted kernel cannot be traced into a compiled graph's runtime checks")
    torch._dynamo.reset()
    inputs = _inputs(device, positions="2d")
    call = torch.compile(lambda inputs: _call(inputs, backend=backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(inputs), _call(inputs, backend=backend))


# Ops.


def test_raw_ops_pass_opcheck(raw):
    for positions in ("", "1d"):
        inputs = _inputs(raw.device, positions=positions)
        rest = (inputs.cos, inputs.sin, inputs.positions)
        seq_first = [tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k)]
        for op in (raw.ops.rope_fwd.default, raw.ops.rope_bwd.default, raw.ops.rope_fwd_.default):
            raw.check(op, (inputs.q, inputs.k, *rest, -2, False))
            raw.check(op, (inputs.q, None, *rest, -2, True))
            raw.check(op, (*seq_first, *rest, -3, False))


def test_public_ops_are_differentiable_and_checked():
    inputs = _inputs(positions="2d").requiring_grad()
    arguments = (inputs.q, inputs.k, inputs.cos, inputs.sin, inputs.positions)
    public = torch.ops.llmkernels.rope
    torch.testing.assert_close(public(*arguments), functional.rope(*arguments))
    torch.library.opcheck(public.default, arguments, test_utils=("test_schema", "test_faketensor"))
    assert all(grad is not None for grad in torch.autograd.grad(public(*arguments)[0].sum(), inputs.q))
    expected = functional.rope(*arguments, interleaved=True)[0]
    turned = torch.ops.llmkernels.rope_(inputs.q * 1.0, inputs.k * 1.0, *arguments[2:], interleaved=True)
    torch.testing.assert_close(turned[0], expected)


def test_export_is_portable(tmp_path):
    """Exported here, it runs where nothing is compiled, on the torch backend."""
    module = nn.RotaryEmbedding(16, 40)
    q, k = torch.randn(1, 3, 5, 16), torch.randn(1, 2, 5, 16)
    seq = {2: torch.export.Dim("seq", max=40)}
    program = torch.export.export(module, (q, k), dynamic_shapes=(seq, seq))
    wide = (torch.randn(1, 3, 9, 16), torch.randn(1, 2, 9, 16))
    check_exported(program, "rope_fwd", wide, module(*wide), tmp_path)


# Tables.


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short_name)
@pytest.mark.parametrize("table_dtype", cases.DTYPES, ids=short_name)
def test_tables_of_any_dtype(dtype, table_dtype, backend, device):
    inputs = _inputs(device)
    q, tables = inputs.q.to(dtype), [table.to(table_dtype) for table in (inputs.cos, inputs.sin)]
    y, _ = functional.rope(q, None, *tables, backend=backend)
    assert y.dtype == dtype
    expected, _ = functional.rope(q.double(), None, *(table.double() for table in tables), backend="torch")
    torch.testing.assert_close(y, expected.to(dtype))


def test_tables_with_strides(backend, device, poison):
    inputs = _inputs(device)
    expected = _call(inputs, backend=backend)
    wide = inputs.cos.repeat_interleave(2, -1)[:, ::2], inputs.sin.T.contiguous().T
    for y, other in zip(functional.rope(inputs.q, inputs.k, *wide, backend=backend), expected, strict=True):
        assert torch.equal(y, other)
    same = inputs.replace(cos=inputs.cos[:1].expand(5, 8), sin=inputs.sin[:1].expand(5, 8))
    zeros = inputs.replace(positions=torch.zeros((), dtype=torch.long, device=device).expand(5))
    for y, other in zip(_call(same, backend=backend), _call(zeros, backend=backend), strict=True):
        assert torch.equal(y, other)


def test_is_what_hugging_faces_llama_does():
    pytest.importorskip("transformers")
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 4, 7, 32), torch.randn(2, 2, 7, 32)
    config = importlib.import_module("transformers").LlamaConfig(
        hidden_size=128, num_attention_heads=4, head_dim=32, max_position_embeddings=64
    )
    positions = torch.arange(7).repeat(2, 1) + 3
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions)
    theirs = llama.apply_rotary_pos_emb(q, k, cos, sin)
    torch.testing.assert_close(functional.rope(q, k, cos, sin), theirs)
    torch.testing.assert_close(nn.RotaryEmbedding(32, 64)(q, k, positions), theirs, rtol=1e-5, atol=1e-5)


# Errors.


def test_bad_arguments_have_one_clear_message():
    q, k, cos, sin = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(9, 8), torch.randn(9, 8)
    positions = torch.zeros(2, 5, dtype=torch.long)

    def call(q=q, k=k, cos=cos, sin=sin, positions=None, **options):
        return lambda: functional.rope(q, k, cos, sin, positions, **options)

    def tables(*shape, **options):
        return call(cos=torch.ones(shape), sin=torch.ones(shape), **options)

    wrong = [
        (TypeError, "rope: q has dtype torch.int64", call(q=q.long())),
        (ValueError, r"rope: q has shape \(5,\), expected 2 to 4 dimensions", call(q=q[0, 0, :, 0])),
        (ValueError, "rope: seq_dim is -1, expected -2", call(seq_dim=-1)),
        (ValueError, "rope: seq_dim is 3, expected -2", call(seq_dim=3)),
        (ValueError, "rope: seq_dim is -3, expected .* of 2", call(q=q[0, 0], k=None, seq_dim=-3)),
        (TypeError, "rope: k has dtype torch.bfloat16, expected torch.float32", call(k=k.bfloat16())),
        (ValueError, "rope: k is on meta, expected cpu", call(k=k.to("meta"))),
        (ValueError, r"rope: k has shape \(2, 2, 4, 16\), expected \(2, 4, 5, 16\)", call(k=k[:, :, :4])),
        (ValueError, r"rope: k has shape \(2, 5, 16\)", call(k=k[0])),
        (TypeError, "rope: cos has dtype torch.int32", call(cos=cos.int())),
        (ValueError, "rope: sin is on meta, expected cpu", call(sin=sin.to("meta"))),
        (ValueError, r"rope: sin has shape \(9, 4\), expected \(9, 8\)", call(sin=sin[:, :4])),
        (ValueError, r"rope: cos has shape \(8,\), expected \[L, R/2\]", call(cos=cos[0], sin=sin[0])),
        (ValueError, "rope: cos has 9 columns for heads of 16", tables(9, 9)),
        (ValueError, "rope: cos has 0 columns", call(cos=cos[:, :0], sin=sin[:, :0])),
        (ValueError, "rope: cos has 15 columns .* an even number", tables(9, 15, q=q[..., :15], k=None)),
        (ValueError, "rope: cos has 16 columns .* interleaved", tables(9, 16, interleaved=True)),
        (ValueError, "rope: cos and sin have 4 rows, expected 5", call(cos=cos[:4], sin=sin[:4])),
        (ValueError, r"rope: cos has shape \(3, 5, 8\), expected \[B or 1", tables(3, 5, 8)),
        (ValueError, "rope: positions is given, but", tables(2, 5, 8, positions=positions)),
        (TypeError, "rope: positions has dtype torch.float32", call(positions=positions.float())),
        (ValueError, "rope: positions is on meta", call(positions=positions.to("meta"))),
        (ValueError, r"rope: positions has shape \(5, 2\), expected \(5,\) or \(2, 5\)", call(positions=positions.T)),
        (ValueError, "rope: cos and sin have no rows", call(cos=cos[:0], sin=sin[:0], positions=positions)),
        (ValueError, "rope: positions has 9, but cos and sin have 9 rows", call(positions=positions + 9)),
        (ValueError, "unknown backend 'gpu'", call(backend="gpu")),
        (llmkernels.NoBackendError, "cuda: input is on the CPU", call(backend="cuda")),
    ]  # fmt: skip
    for error, message, wrong_call in wrong:
        with pytest.raises(error, match=message):
            wrong_call()


def test_raw_ops_never_crash():
    if llmkernels.backends()["cpu"] is not None:
        pytest.skip("cpu: " + llmkernels.backends()["cpu"])
    raw, q = torch.ops.llmkernels_cpu, torch.randn(2, 4, 5, 16)
    cos, positions = torch.randn(9, 8), torch.zeros(5, dtype=torch.long)
    wrong = (
        lambda: raw.rope_fwd(q, q[:, :, :4], cos, cos, None, -2, False),
        lambda: raw.rope_fwd(q, q.half(), cos, cos, None, -2, False),
        lambda: raw.rope_fwd(q.long(), None, cos, cos, None, -2, False),
        lambda: raw.rope_fwd(q, None, cos, cos.double(), None, -2, False),
        lambda: raw.rope_fwd(q, None, cos, cos[:, :4], None, -2, False),
        lambda: raw.rope_fwd(q[..., :8], None, cos, cos, None, -2, False),
        lambda: raw.rope_fwd(q, None, cos[:3], cos[:3], None, -2, False),
        lambda: raw.rope_fwd(q, None, cos[None], cos[None], None, -2, False),
        lambda: raw.rope_fwd(q, None, cos, cos, positions[:4], -2, False),
        lambda: raw.rope_fwd(q, None, cos, cos, positions - 1, -2, False),
        lambda: raw.rope_bwd(q, None, cos, cos, positions.short(), -2, False),
        lambda: raw.rope_fwd_(q, None, cos, cos, None, -1, False),
        lambda: raw.rope_fwd_(q[0, 0, 0], None, cos, cos, None, -2, False),
    )
    for wrong_call in wrong:
        with pytest.raises((ValueError, TypeError), match="expected"):
            wrong_call()


# The module.


def test_module_turns_by_its_tables():
    module = nn.RotaryEmbedding(
        8, 12, theta=500.0, interleaved=True, seq_dim=-3, scaling={"type": "linear", "factor": 2}
    )
    q, k, positions = torch.randn(2, 5, 3, 16), torch.randn(2, 5, 1, 16), torch.randint(12, (2, 5))
    tables = functional.rope_cache(500.0, 8, 12, scaling={"type": "linear", "factor": 2})
    expected = functional.rope(q, k, *tables, positions, interleaved=True, seq_dim=-3)
    torch.testing.assert_close(module(q, k, positions), expected)
    assert module.state_dict() == {} and "length=12" in repr(module) and "interleaved=True" in repr(module)
    assert module(q, None)[1] is None


def test_module_keeps_the_digits_of_its_tables():
    module = nn.RotaryEmbedding(8, 12).to(torch.bfloat16)
    assert module.cos.dtype == torch.float32 and torch.equal(module.cos, functional.rope_cache(10000.0, 8, 12)[0])
    assert nn.RotaryEmbedding(8, 12, dtype=torch.bfloat16).cos.dtype == torch.bfloat16
    assert nn.RotaryEmbedding(8, 12, device="meta").cos.is_meta
    with pytest.raises(ValueError, match="have 12 rows, expected 13"):
        module(torch.randn(13, 8), None)
    module.resize(13)
    assert module(torch.randn(13, 8), None)[0].shape == (13, 8)
    with pytest.raises(ValueError, match="dim is 7, expected an even"):
        nn.RotaryEmbedding(7, 12)
