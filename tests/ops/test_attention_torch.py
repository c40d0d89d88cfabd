"""Attention beside torch: each rank, broadcast and mask that it accepts, and all of its machinery."""

import itertools
import math

import hypothesis
import pytest
import torch
import torch.nn.functional as torch_functional
import torch.utils.checkpoint
from hypothesis import strategies

import llmkernels
from llmkernels import functional
from llmkernels.ops.attention import cases
from llmkernels.testing.inputs import short_name
from tests.ops.attention_support import SDPA, VARLEN
from tests.support import check_exported


def ours(*arguments, **options):
    return functional.scaled_dot_product_attention(*arguments, backend="torch", **options)


def theirs(*arguments, **options):
    return torch_functional.scaled_dot_product_attention(*arguments, **options)


def outcome(function, *arguments, **options):
    """A result, or None where an error was raised."""
    try:
        return function(*arguments, **options)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- shapes ---------------------------------------------------------------------------------------------------------

LEADING = ((), (2,), (1,), (2, 4), (1, 4), (2, 1), (3, 2, 4), (1, 2, 4), (3, 1, 4), (3, 2, 1), (4,), (1, 1))


@pytest.mark.parametrize("enable_gqa", (False, True))
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_every_rank_and_broadcast(leading, enable_gqa):
    """All that torch accepts gives the same, and all that it refuses is refused."""
    accepted = 0
    for key_leading, value_leading in itertools.product(LEADING, repeat=2):
        tensors = normal(*leading, 5, 8), normal(*key_leading, 7, 8, seed=1), normal(*value_leading, 7, 6, seed=2)
        expected, found = (outcome(f, *tensors, enable_gqa=enable_gqa) for f in (theirs, ours))
        assert (expected is None) == (found is None), (leading, key_leading, value_leading)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            accepted += 1
    assert accepted > 0 or (enable_gqa and leading == ())


MASKS = (
    (7,), (5, 7), (1, 7), (5, 1), (1, 1), (4, 5, 7), (1, 5, 7), (4, 1, 1), (2, 5, 7), (2, 4, 5, 7), (1, 4, 5, 7),
    (2, 1, 5, 7), (2, 1, 1, 7), (1, 1, 1, 1), (3, 1, 5, 7), (3, 2, 4, 5, 7), (1, 1, 4, 5, 7), (3, 1, 1, 1, 7),
    (3, 2, 1, 5, 7), (1, 2, 1, 1, 1),
)  # fmt: skip


@pytest.mark.parametrize("boolean", (False, True), ids=("additive", "bool"))
@pytest.mark.parametrize("leading", ((), (4,), (2, 4), (1, 1), (3, 2, 4)), ids=str)
def test_masks_of_every_rank(leading, boolean):
    tensors = [normal(*leading, length, dim, seed=dim).requires_grad_() for length, dim in ((5, 8), (7, 8), (7, 6))]
    compared = 0
    for shape in MASKS:
        mask = normal(*shape, seed=3) > -1 if boolean else normal(*shape, seed=3).requires_grad_()
        expected, found = (outcome(f, *tensors, mask) for f in (theirs, ours))
        if expected is None:
            continue  # of masks of too few or too many dimensions we understand more than torch
        assert found is not None, shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        leaves = tensors if boolean else [*tensors, mask]
        grads = [torch.autograd.grad(out, leaves, torch.ones_like(out) / 3 + out.detach()) for out in (found, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
        compared += 1
    assert compared >= 5


def test_lse_has_the_shape_of_the_result():
    for query, key, shape in (
        ((5, 8), (7, 8), (5,)),
        ((4, 5, 8), (7, 8), (4, 5)),
        ((2, 1, 4, 5, 8), (3, 1, 7, 8), (2, 3, 4, 5)),
    ):
        tensors = normal(*query), normal(*key), normal(*key)
        out, lse = ours(*tensors, return_lse=True)
        assert lse.shape == shape == out.shape[:-1] and lse.dtype == torch.float32
        scores = tensors[0] @ tensors[1].transpose(-1, -2) / math.sqrt(8)
        torch.testing.assert_close(lse, torch.logsumexp(scores, -1).expand(shape))


def test_grouped_heads_of_key_and_value_may_differ_as_in_torch():
    q = normal(2, 12, 5, 8)
    for key_heads, value_heads in ((2, 1), (1, 2), (4, 2), (4, 6), (12, 3)):
        tensors = q, normal(2, key_heads, 7, 8, seed=1), normal(2, value_heads, 7, 8, seed=2)
        torch.testing.assert_close(ours(*tensors, enable_gqa=True), theirs(*tensors, enable_gqa=True))


def test_is_causal_is_torchs_also_together_with_a_mask():
    for rows, keys in ((5, 5), (5, 9), (9, 5)):
        tensors = normal(2, 2, rows, 8), normal(2, 2, keys, 8, seed=1), normal(2, 2, keys, 8, seed=2)
        torch.testing.assert_close(ours(*tensors, is_causal=True), theirs(*tensors, is_causal=True))
        mask = normal(rows, keys, seed=3) > -1
        mask[:, 0] = True
        both = mask & torch.ones(rows, keys, dtype=torch.bool).tril()
        torch.testing.assert_close(ours(*tensors, mask, is_causal=True), theirs(*tensors, both))


# --- a random search ------------------------------------------------------------------------------------------------


@strategies.composite
def calls(draw):
    integer = lambda low, high: draw(strategies.integers(low, high))
    one_of = lambda *values: draw(strategies.sampled_from(values))
    key_heads = integer(1, 3)
    return {
        "B": integer(1, 3), "Hk": key_heads, "H": key_heads * integer(1, 3), "S": integer(1, 12), "T": integer(1, 12),
        "D": integer(1, 9), "Dv": integer(1, 9), "causal": one_of(None, "top_left", "bottom_right"),
        "window": (integer(-1, 6), integer(-1, 6)), "softcap": one_of(0.0, 0.0, 3.0), "alibi": one_of(False, True),
        "sinks": one_of(False, True), "mask": one_of(None, "bool", "additive"), "scale": one_of(None, 0.3),
        "mask_shape": one_of("BHST", "ST", "BT", "HT", "S", ""), "seed": integer(0, 10**6),
    }  # fmt: skip


def by_torch(call, q, k, v, mask, slopes, sinks):
    """The same call by torch's own attention in fp64: its options become one additive mask, a sink one more key."""
    group, rows, keys = call["H"] // call["Hk"], call["S"], call["T"]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    i, j = torch.arange(rows)[:, None], torch.arange(keys)
    center = i if call["causal"] == "top_left" else i + keys - rows
    bias = torch.zeros(call["B"], call["H"], rows, keys, dtype=torch.float64)
    if slopes is not None:
        bias = bias - slopes[:, None, None] * (j - center).abs()
    if mask is not None:
        bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
    left, right = call["window"]
    right = 0 if call["causal"] else right
    hidden = (j < center - left) if left >= 0 else torch.zeros(rows, keys, dtype=torch.bool)
    hidden = hidden | (j > center + right) if right >= 0 else hidden
    bias = bias.masked_fill(hidden, -torch.inf)
    if call["softcap"]:
        scale = call["scale"] or 1.0 / math.sqrt(call["D"])
        bias = bias + call["softcap"] * torch.tanh(q @ k.transpose(-1, -2) * scale / call["softcap"])
        q = torch.zeros_like(q)
    if sinks is not None:
        bias = torch.cat((bias, sinks[:, None, None].expand(call["B"], -1, rows, 1)), -1)
        k, v = (torch.cat((x, torch.zeros_like(x[:, :, :1])), 2) for x in (k, v))
        q = torch.cat((q, torch.zeros_like(q[..., :1])), -1)
        k = torch.cat((k, torch.zeros_like(k[..., :1])), -1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        scale = call["scale"] or 1.0 / math.sqrt(call["D"])
        out = torch_functional.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    return torch.where((bias == -torch.inf).all(-1, keepdim=True), 0.0, out)


@hypothesis.given(calls())
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape_and_options_are_torchs_own_attention(call):
    generator = torch.Generator().manual_seed(call["seed"])
    fresh = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    B, H, S, T = (call[letter] for letter in "BHST")
    q, k, v = fresh(B, H, S, call["D"]), fresh(B, call["Hk"], T, call["D"]), fresh(B, call["Hk"], T, call["Dv"])
    sizes = [size if letter in call["mask_shape"] else 1 for letter, size in zip("BHST", (B, H, S, T), strict=True)]
    mask = fresh(*sizes) if call["mask"] else None
    mask = mask.detach() > -0.7 if call["mask"] == "bool" else mask
    slopes, sinks = fresh(H).detach().abs() if call["alibi"] else None, fresh(H) if call["sinks"] else None
    found = ours(
        q, k, v, mask, scale=call["scale"], enable_gqa=True, causal=call["causal"], window=call["window"],
        softcap=call["softcap"], alibi_slopes=slopes, sinks=sinks,
    )  # fmt: skip
    expected = by_torch(call, q, k, v, mask, slopes, sinks)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    leaves = [x for x in (q, k, v, mask, sinks) if x is not None and x.requires_grad]
    dout = fresh(*found.shape).detach()
    # torch's own backward of a row without keys is NaN.
    dout = torch.where(torch.isnan(expected).any(-1, keepdim=True) | (found == 0).all(-1, keepdim=True), 0.0, dout)
    grads = torch.autograd.grad(found, leaves, dout)
    assert all(torch.isfinite(grad).all() for grad in grads)
    if not (found == 0).all(-1).any():
        torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, dout), rtol=1e-8, atol=1e-9)


# --- autocast, functorch, second order, checkpoint, export, compile -------------------------------------------------


@pytest.mark.parametrize("mask_dtype", (None, torch.bool, torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short_name)
def test_autocast_is_torchs(dtype, mask_dtype):
    q, k, v = (normal(2, 4, 5, 8, seed=seed, dtype=dtype) for seed in range(3))
    mask = (
        None if mask_dtype is None else (normal(5, 5) > -1 if mask_dtype == torch.bool else normal(5, 5).to(mask_dtype))
    )
    for lower in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", lower):
            found, expected = (outcome(f, q, k, v, mask) for f in (ours, theirs))
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # and the same dtype


def test_functorch():
    q, k, v = (normal(2, 2, 5, 4, seed=seed, dtype=torch.float64) for seed in range(3))
    mask = normal(5, 5, seed=4, dtype=torch.float64)
    tangents = tuple(torch.ones_like(x) for x in (q, k, v))
    small = [x[:1, :1, :2] for x in (q, k, v)]
    transforms = {
        "grad": lambda f: torch.func.grad(lambda *t: f(*t).cos().sum(), (0, 1, 2, 3))(q, k, v, mask),
        "vmap": lambda f: torch.func.vmap(f, (0, None, 0, None))(q, k, v, mask),
        "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(lambda q: f(q, k[0], v[0], mask).cos().sum()))(q),
        "jvp": lambda f: torch.func.jvp(lambda q, k, v: f(q, k, v, mask), (q, k, v), tangents),
        "hessian": lambda f: torch.func.hessian(lambda m: f(*small, m).cos().sum())(mask[:2, :2]),
    }

    def formula(q, k, v, mask):
        return torch.softmax(q @ k.transpose(-1, -2) / 2 + mask, -1) @ v

    for name, transform in transforms.items():
        found, expected = transform(ours), transform(formula)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("op", cases.OPS)
def test_second_order_with_every_option(op):
    case = cases.AttentionCase(
        op, B=2, H=2, Hk=1, S=3, T=4, D=3, dtype=torch.float64, causal="bottom_right", window=(2, 0), softcap=2.0,
        alibi=True, sinks=True, dropout=0.3, mask="additive" if op == SDPA else None, mask_shape="ST",
        lengths=None if op == SDPA else ((2, 1), (3, 1)),
    )  # fmt: skip
    inputs = cases.make_inputs(case).requiring_grad()
    names = inputs.leaf_names()
    function = lambda *leaves: cases.call(case, inputs.replace(**dict(zip(names, leaves, strict=True))), "torch")
    assert torch.autograd.gradcheck(function, inputs.leaves())
    assert torch.autograd.gradgradcheck(function, inputs.leaves())


def test_alibi_slopes_have_a_gradient():
    q, k, v = (normal(1, 2, 3, 2, seed=seed, dtype=torch.float64) for seed in range(3))
    for shape in ((2,), (1, 2)):
        slopes = normal(*shape, dtype=torch.float64).abs().requires_grad_()
        assert torch.autograd.gradcheck(lambda slopes: ours(q, k, v, alibi_slopes=slopes), slopes)


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpoint_replays_dropout(use_reentrant):
    q, k, v = (normal(1, 2, 9, 8, seed=seed).requires_grad_() for seed in range(3))
    function = lambda q, k, v: ours(q, k, v, dropout_p=0.5)
    results = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        checkpoint = lambda *t: torch.utils.checkpoint.checkpoint(function, *t, use_reentrant=use_reentrant)
        (checkpoint if wrapped else function)(q, k, v).cos().sum().backward()
        results.append([x.grad for x in (q, k, v)])
        q.grad = k.grad = v.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("op", cases.OPS)
def test_compile_with_dynamic_shapes(op):
    """One graph for all lengths."""
    torch._dynamo.reset()

    def call(q, k, v, mask, sinks, ends, longest):
        options = {"causal": "bottom_right", "sinks": sinks, "return_lse": True, "backend": "torch"}
        if op == VARLEN:
            return functional.attention_varlen(q, k, v, *ends, *longest, **options)
        return functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for S, T in ((5, 9), (12, 7), (13, 20)):
        case = cases.AttentionCase(
            op, B=2, H=4, Hk=2, S=S, T=T, D=16, sinks=True, mask="additive" if op == SDPA else None,
            lengths=None if op == SDPA else ((S, 3), (T, 2)),
        )  # fmt: skip
        inputs = cases.make_inputs(case).requiring_grad()
        arguments = (inputs.q, inputs.k, inputs.v, inputs.mask, inputs.sinks, inputs.cu_seqlens, (S, T))
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = compiled(*arguments)
        expected = call(*arguments)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(inputs.backward(found), inputs.backward(expected))


class Attends(torch.nn.Module):
    def forward(self, q, k, v, ends=None):
        if ends is not None:
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            return functional.attention_varlen(q, k, v, *ends, 6, 18, causal="bottom_right")
        return functional.scaled_dot_product_attention(q, k, v, causal="bottom_right", window=(5, 0), enable_gqa=True)


def test_export_is_portable(tmp_path):
    """Exported here, it runs where nothing is compiled, on the torch backend."""
    q, k, v = normal(2, 4, 6, 8), normal(2, 2, 9, 8, seed=1), normal(2, 2, 9, 8, seed=2)
    keys = torch.export.Dim("keys")
    program = torch.export.export(Attends(), (q, k, v), dynamic_shapes=({}, {2: keys}, {2: keys}))
    ends = (torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 3, 9], dtype=torch.int32))
    packed = torch.export.export(Attends(), (q[:1], k[:1], v[:1], ends))
    for each in (program, packed):
        names = {str(node.target) for node in each.graph.nodes if node.op == "call_function"}
        assert "llmkernels.attention_fwd.default" in names and not any("llmkernels_" in name for name in names)
    with llmkernels.use_backend("torch"):
        torch.testing.assert_close(packed.module()(q[:1], k[:1], v[:1], ends), Attends()(q[:1], k[:1], v[:1], ends))
    longer = [torch.cat((x, x), 2) for x in (k, v)]
    with llmkernels.use_backend("torch"):
        expected = Attends()(q, *longer)
    check_exported(program, "attention_fwd", (q, *longer), expected, tmp_path)


@pytest.mark.parametrize("op", cases.OPS)
def test_public_op_is_differentiable_and_checked(op):
    public = getattr(torch.ops.llmkernels, op)
    case = cases.plain_case(op)
    inputs = cases.make_inputs(case).requiring_grad()
    with llmkernels.use_backend("torch"):
        if op == SDPA:
            arguments, options = (
                (inputs.q, inputs.k, inputs.v, inputs.mask, 0.0, False, None, True),
                {"sinks": inputs.sinks},
            )
        else:
            arguments, options = (inputs.q, inputs.k, inputs.v, *inputs.cu_seqlens, 12, 9), {"sinks": inputs.sinks}
        out, lse = public(*arguments, **options)
        torch.testing.assert_close((out, lse), cases.call(case, inputs, "torch"))
        inputs.backward((out, lse))
        torch.library.opcheck(public.default, arguments, options, test_utils=("test_schema", "test_faketensor"))


def raw_arguments(op, device):
    """(arguments of attention_fwd, of attention_bwd without what it gets from the forward) with all options."""
    case = cases.AttentionCase(op, B=2, H=4, Hk=2, S=6, T=9, D=8, causal="bottom_right", sinks=True, alibi=True,
                               mask="additive" if op == SDPA else None,
                               lengths=None if op == SDPA else ((6, 2), (9, 1)))  # fmt: skip
    inputs = cases.make_inputs(case, device)
    q, k, v, dout, dlse = inputs.q, inputs.k, inputs.v, inputs.dout, inputs.dlse
    if op == VARLEN:
        q, k, v, dout = (x.transpose(0, 1)[None] for x in (q, k, v, dout))
        dlse = dlse[None]
    seed = torch.tensor(5, device=device)
    tensors = (q, k, v, inputs.mask, inputs.alibi_slopes, inputs.sinks, seed, *(inputs.cu_seqlens or (None, None)))
    return (dout, dlse), tensors, (6, 9), (0.3, -1, 0, False, 2.0, 0.25)


@pytest.mark.parametrize("op", cases.OPS)
def test_raw_ops_pass_opcheck(op, raw):
    grads, tensors, (longest_q, longest_k), options = raw_arguments(op, raw.device)
    with llmkernels.use_backend(raw.backend):
        raw.check(raw.ops.attention_fwd.default, (*tensors, longest_q, *options))
        results = raw.ops.attention_fwd(*tensors, longest_q, *options)
        for wanted in ([True] * 5, [True, False, False, False, False], [False, True, True, False, False]):
            wanted = [
                want and tensor is not None for want, tensor in zip(wanted, (*tensors[:4], tensors[5]), strict=True)
            ]
            arguments = (*grads, *tensors, longest_q, longest_k, *results, *options, wanted)
            raw.check(raw.ops.attention_bwd.default, arguments)
