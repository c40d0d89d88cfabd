"""llmkernels under torch.nn.functional.scaled_dot_product_attention: it runs, agrees, and is undone."""

import itertools

import pytest
import torch
import torch.nn.functional as torch_functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import llmkernels
from llmkernels import registry, sdpa_hook
from llmkernels.sdpa_hook import CPU_OP
from tests.support import run_python

pytestmark = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="this torch has no such hook"
)


@pytest.fixture(params=("torch", "cpu", "cuda-sim-sm80"))
def hook(request):
    """Enabled on a backend; the calls that it took, by their dtype."""
    from tests.conftest import absent

    reason = absent(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    taken = []
    llmkernels.enable_sdpa(backend=request.param)
    try:
        with registry.observe(lambda op, tensors, backend: taken.append(tensors[0].dtype)):
            yield taken
    finally:
        llmkernels.disable_sdpa()


def tensors(dtype=torch.float32, key_heads=4, S=9, T=12):
    generator = torch.Generator().manual_seed(0)
    make = lambda heads, length: torch.randn(2, length, heads, 16, generator=generator).to(dtype).transpose(1, 2)
    return [x.requires_grad_() for x in (make(4, S), make(key_heads, T), make(key_heads, T))]


def results(inputs, *arguments, **options):
    out = torch_functional.scaled_dot_product_attention(*inputs, *arguments, **options)
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return out, *torch.autograd.grad(out, inputs, dout)


def by_formula(inputs, *arguments, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return results(inputs, *arguments, **options)


def random_mask(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[..., 0] = True
    return mask


CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool mask": {"attn_mask": random_mask(9, 12)},
    "additive mask": {"attn_mask": torch.randn(2, 1, 9, 12, generator=torch.Generator().manual_seed(2))},
    "padding": {"attn_mask": random_mask(2, 1, 1, 12)},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=list(CALLS))
def test_forward_and_backward(options, hook):
    inputs = tensors()
    expected = by_formula(inputs, **options)
    assert hook == [], "sdpa_kernel(MATH) goes past us"
    found = results(inputs, **options)
    assert len(hook) == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_other_dtypes_and_grouped_heads(dtype, hook):
    for key_heads in (4, 2, 1):
        inputs = tensors(dtype, key_heads)
        wide = [x.detach().float().requires_grad_() for x in inputs]
        found, expected = results(inputs, enable_gqa=True), by_formula(wide, enable_gqa=True)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.float(), other, rtol=3e-2, atol=3e-2)
    assert hook == [dtype] * 6


def test_what_no_kernel_takes_stays_with_torch(monkeypatch):
    monkeypatch.setattr("llmkernels.sdpa_hook._native.why_absent", lambda name: None)
    inputs = tensors(torch.float64)
    expected = results(inputs)
    asked = []
    llmkernels.enable_sdpa()
    try:
        with registry.observe(lambda *call: asked.append(call)):
            found = results(inputs)
    finally:
        llmkernels.disable_sdpa()
    assert len(asked) == 2 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_finfo_min_rows_have_their_true_gradients(hook):
    """Where torch's own kernel is wrong by a factor of the number of keys."""
    inputs = tensors()
    mask = torch.zeros(2, 1, 9, 12)
    mask[0, :, 3:] = torch.finfo(torch.float32).min
    torch.testing.assert_close(results(inputs, mask), by_formula(inputs, mask), rtol=1e-4, atol=1e-5)


def test_rows_without_keys(hook):
    inputs = tensors()
    mask = random_mask(9, 12)
    mask[4] = False
    out, *grads = results(inputs, mask)
    assert not out[:, :, 4].any() and not grads[0][:, :, 4].any() and all(torch.isfinite(grad).all() for grad in grads)


def test_functorch_autocast_compile_and_checkpoint(hook):
    attend = torch_functional.scaled_dot_product_attention
    q, k, v = inputs = tensors()
    loss = lambda *tensors: attend(*tensors).cos().sum()
    grads = torch.func.grad(loss, (0, 1, 2))(*inputs)
    assert len(hook) == 2
    torch.testing.assert_close(grads, torch.autograd.grad(loss(*inputs), inputs), rtol=1e-5, atol=1e-6)
    stacked = [torch.stack((x, 2 * x)).detach() for x in inputs]
    mapped = torch.func.vmap(lambda q, k, v: attend(q, k, v))(*stacked)
    torch.testing.assert_close(mapped[1], attend(2 * q, 2 * k, 2 * v), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*inputs).dtype == torch.bfloat16 and hook[-1] == torch.bfloat16
    torch.testing.assert_close(torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=False), attend(*inputs))
    torch._dynamo.reset()
    before = len(hook)
    compiled = torch.compile(lambda *t: attend(*t, is_causal=True), fullgraph=True, backend="aot_eager")
    found = compiled(*inputs)
    dout = torch.ones_like(found)
    torch.testing.assert_close(found, attend(*inputs, is_causal=True))
    expected = torch.autograd.grad(attend(*inputs, is_causal=True), inputs, dout)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, dout), expected)
    assert len(hook) > before


def test_layouts_are_those_of_atens_fakes(hook):
    """Inductor relies on them."""
    op = getattr(torch.ops.aten, CPU_OP)
    backward = getattr(torch.ops.aten, f"{CPU_OP}_backward")
    for contiguous, (S, T) in itertools.product((False, True), ((9, 12), (1, 5))):
        q, k, v = (x.detach().contiguous() if contiguous else x.detach() for x in tensors(S=S, T=T))
        found = op(q, k, v)
        grads = backward(found[0], q, k, v, *found, 0.0, False)
        on_meta = [x.to("meta") for x in (q, k, v)]
        promised = op(*on_meta)
        promised = (*promised, *backward(promised[0], *on_meta, *promised, 0.0, False))
        for mine, other in zip((*found, *grads), promised, strict=True):
            assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
            kept = [i for i, size in enumerate(mine.shape) if size > 1]
            assert [mine.stride(i) for i in kept] == [other.stride(i) for i in kept]


def test_it_is_undone():
    inputs = tensors()
    before = results(inputs)
    calls = []
    with registry.observe(lambda *call: calls.append(call)):
        assert not llmkernels.disable_sdpa()
        llmkernels.enable_sdpa(backend="torch")
        llmkernels.enable_sdpa(backend="torch")  # twice is once
        results(inputs)
        assert len(calls) == 2
        assert torch.nn.attention.current_flash_attention_impl() == "llmkernels"
        assert llmkernels.disable_sdpa() and not llmkernels.disable_sdpa()
        assert all(torch.equal(a, b) for a, b in zip(results(inputs), before, strict=True))
        assert len(calls) == 2 and torch.nn.attention.current_flash_attention_impl() is None


def test_torchs_own_functions_do_the_same(monkeypatch):
    assert "llmkernels" in torch.nn.attention.list_flash_attention_impls()
    monkeypatch.setattr("llmkernels.sdpa_hook._native.why_absent", lambda name: None)
    calls = []
    torch.nn.attention.activate_flash_attention_impl("llmkernels")
    try:
        with registry.observe(lambda *call: calls.append(call)), llmkernels.use_backend("torch"):
            results(tensors())
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert len(calls) == 2  # asked, and with torch forced torch's own kernel ran


def test_no_warning_is_given():
    """torch gives it once in a process."""
    code = """
        import warnings; warnings.simplefilter("error")
        import llmkernels
        llmkernels.enable_sdpa(backend="torch"); llmkernels.disable_sdpa()
    """
    run_python(code)


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="enable_sdpa: unknown backend 'cudnn'"):
        llmkernels.enable_sdpa(backend="cudnn")
    with monkeypatch.context() as patch:
        patch.setattr("llmkernels.sdpa_hook._native.why_absent", lambda name: "not built (no compiler)")
        patch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(
            RuntimeError, match=r"no attention kernel .*CPU: not built \(no compiler\); CUDA: torch sees no"
        ):
            llmkernels.enable_sdpa()
    assert torch.nn.attention.current_flash_attention_impl() is None
    monkeypatch.delattr("torch.nn.attention.register_flash_attention_impl")
    with pytest.raises(RuntimeError, match="enable_sdpa: torch .* has no register_flash_attention_impl"):
        llmkernels.enable_sdpa()


def test_the_ops_of_cuda_replay_dropout_by_the_seed_that_they_keep():
    """The Python around the kernels, on CPU tensors."""
    forward, backward = (cls(None, "CUDA", "torch") for cls in (sdpa_hook._CUDA, sdpa_hook._CUDABackward))
    for p, inputs in itertools.product((0.0, 0.4), (tensors(), [x.contiguous() for x in tensors()])):
        torch.manual_seed(2)
        out, lse, cum_q, cum_k, max_q, max_k, state, unused, mask = forward(*inputs, p, True)
        assert cum_q is cum_k is None and (max_q, max_k) == (9, 12) and lse.shape == (2, 4, 9) and mask.numel() == 0
        assert state.dtype == unused.dtype == torch.uint64 and out.stride() == inputs[0].stride()
        dout = torch.linspace(-1, 1, out.numel()).view(out.shape)
        grads = backward(dout, *inputs, out, lse, cum_q, cum_k, max_q, max_k, p, True, state, unused)
        torch.manual_seed(2)
        options = {"is_causal": True, "dropout_p": p, "backend": "torch"}
        expected = llmkernels.functional.scaled_dot_product_attention(*inputs, **options)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, dout), rtol=1e-5, atol=1e-5)
