"""attention_kvcache and merge_attention: the tolerance rule on every backend, properties, compilation, errors."""

import math
from dataclasses import replace

import pytest
import torch

import llmkernels
from llmkernels import functional
from llmkernels.ops.attention import forward_cases
from llmkernels.ops.attention.forward_cases import GARBAGE
from llmkernels.testing.battery import baseline, evaluate, failures, judge_results
from llmkernels.testing.inputs import short_name

OP = "attention_kvcache"
DTYPES = forward_cases.DTYPES


@pytest.mark.parametrize("case", forward_cases.test_cases(), ids=str)
def test_matches_fp64_truth(case, backend, device, poison, covers):
    inputs = forward_cases.make_inputs(case, device)
    before = inputs.k_cache.clone(), inputs.v_cache.clone()
    try:
        results = evaluate(forward_cases, case, inputs, backend)
    except llmkernels.NoBackendError as error:  # of a case that tests/coverage.toml does not list
        pytest.skip(str(error).split("cannot run this call: ")[-1])
    assert failures(judge_results(forward_cases, case, inputs, results)) == []
    # What was written is what was appended, and nothing else was written.
    caches = ((inputs.k_cache, before[0], inputs.k), (inputs.v_cache, before[1], inputs.v))
    for cache, old, new in caches:
        written = ~(torch.eq(cache, old) | (cache.isnan() & old.isnan())).flatten(2).all(-1)
        assert int(written.sum()) == len(case.lengths) * case.appended
        if case.appended and not (case.rotary and new is inputs.k):
            rows = lambda x: {tuple(row.flatten().tolist()) for row in x}
            assert rows(cache[written]) == rows(new.flatten(0, 1))
    covers(OP, backend, short_name(case.dtype), case.name, "fwd")


WRONG = {
    "one key too few": lambda case: {"lengths": tuple(max(0, length - 1) for length in case.lengths)},
    "top_left": lambda case: {"causal": "top_left"},
    "the window one shorter": lambda case: {"window": (19, 3)},
    "no softcap": lambda case: {"softcap": 0.0},
    "no alibi": lambda case: {"alibi": False},
    "no sinks": lambda case: {"sinks": False},
    "the other pairs": lambda case: {"rotary": "interleaved"},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", forward_cases.DTYPES[1:], ids=short_name)
def test_rule_rejects_wrong_variants(wrong, dtype):
    case = next(case for case in forward_cases.test_cases() if case.name == "combined" and case.dtype == dtype)
    inputs = forward_cases.make_inputs(case)
    other = replace(case, **WRONG[wrong](case))
    shorter = lambda rows: [x[: n + case.appended] for x, n in zip(rows, other.lengths, strict=True)]
    changed = inputs.replace(
        keys=shorter(inputs.keys),
        values=shorter(inputs.values),
        alibi_slopes=inputs.alibi_slopes if other.alibi else None,
        sinks=inputs.sinks if other.sinks else None,
    )
    rejected = lambda *given: failures(judge_results(forward_cases, case, inputs, baseline(forward_cases, *given)))
    assert rejected(case, inputs) == []
    assert rejected(other, changed) != []


# --- properties -----------------------------------------------------------------------------------------------------


def tensors(device: str, batch=2, rows=12, heads=4, key_heads=2, dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    shapes = ((batch, rows, heads, dim), (batch, rows, key_heads, dim), (batch, rows, key_heads, dim))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("paged", (False, True))
@pytest.mark.parametrize("interleaved", (False, True))
def test_decoding_step_by_step_equals_one_prefill(paged, interleaved, backend, device):
    q, k, v = tensors(device)
    batch, rows = q.shape[:2]
    angles = torch.arange(rows, device=device)[:, None] / 20.0 ** torch.linspace(0, 1, 8, device=device)
    options = {
        "rotary": (angles.cos(), angles.sin(), interleaved), "causal": "bottom_right", "window": (6, 0),
        "backend": backend,
        "block_table": torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32, device=device) if paged else None,
    }  # fmt: skip
    shape = (6, 4, *k.shape[2:]) if paged else k.shape
    empty = lambda: (k.new_full(shape, GARBAGE), k.new_full(shape, GARBAGE))
    prefilled = empty()
    whole = functional.attention_kvcache(q, *prefilled, k=k, v=v, cache_seqlens=0, **options)
    for sizes in ((1,) * rows, (5, 3, 4)):
        grown, outs, start = empty(), [], 0
        for size in sizes:
            now = slice(start, start + size)
            lengths = torch.full((batch,), start, dtype=torch.int32, device=device) if size == 1 else start
            outs.append(
                functional.attention_kvcache(
                    q[:, now], *grown, k=k[:, now], v=v[:, now], cache_seqlens=lengths, **options
                )
            )
            start += size
        torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(grown, prefilled, strict=True))


def test_a_cache_in_two_pieces_merges_to_the_whole(backend, device):
    q, k, v = tensors(device, rows=40)
    q = q[:, :3]
    lengths = torch.tensor([40, 26], dtype=torch.int32, device=device)
    options = {"return_lse": True, "backend": backend}
    whole = functional.attention_kvcache(q, k, v, cache_seqlens=lengths, **options)
    for cut in (0, 13, 26, 30):
        first = functional.attention_kvcache(q, k[:, :cut], v[:, :cut], cache_seqlens=lengths.clamp(max=cut), **options)
        rest = (lengths - cut).clamp(min=0)
        second = functional.attention_kvcache(q, k[:, cut:], v[:, cut:], cache_seqlens=rest, **options)
        torch.testing.assert_close(functional.merge_attention(*first, *second, seq_dim=-3), whole)


def test_a_page_is_shared_and_a_batch_is_indexed(backend, device):
    q, k, v = tensors(device, batch=3)
    chosen = torch.tensor([2, 0, 2], device=device)
    lengths = torch.tensor([12, 4, 7], dtype=torch.int32, device=device)
    options = {"cache_seqlens": lengths, "causal": "bottom_right", "backend": backend}
    torch.testing.assert_close(
        functional.attention_kvcache(q, k, v, block_table=chosen.int()[:, None], **options),
        functional.attention_kvcache(q, k[chosen], v[chosen], **options),
    )


def test_sequences_without_keys_and_empty_tensors(backend, device):
    q, k, v = tensors(device)
    lengths = torch.tensor([0, 5], dtype=torch.int32, device=device)
    out, lse = functional.attention_kvcache(q, k, v, cache_seqlens=lengths, return_lse=True, backend=backend)
    assert bool((out[0] == 0.0).all()) and bool((lse[0] == -torch.inf).all()) and bool(lse[1].isfinite().all())
    sinks = torch.arange(4.0, device=device)
    out, lse = functional.attention_kvcache(q, k, v, cache_seqlens=0, sinks=sinks, return_lse=True, backend=backend)
    assert bool((out == 0.0).all()) and torch.equal(lse, sinks[None, :, None].expand_as(lse))
    for queries, keys in ((q[:, :0], k), (q, k[:, :0]), (q[:0], k[:0])):
        out = functional.attention_kvcache(queries, keys, keys, backend=backend)
        assert out.shape == queries.shape and not bool(out.any() and keys.shape[1] == 0)
    table, lengths = torch.zeros(2, 3, dtype=torch.int32, device=device), torch.zeros_like(lengths)
    pages = k[:, :0]  # with room for no key
    assert not functional.attention_kvcache(
        q, pages, pages, cache_seqlens=lengths, block_table=table, backend=backend
    ).any()


def test_nan_within_a_sequence_comes_out(backend, device):
    q, k, v = tensors(device)
    k[0, 3, 1] = GARBAGE
    out = functional.attention_kvcache(q, k, v, cache_seqlens=8, backend=backend)
    assert bool(out[0, :, 2:].isnan().all()) and not bool(out[0, :, :2].isnan().any() or out[1].isnan().any())


@pytest.mark.parametrize("layout", ("heads first", "every second", "offset"))
def test_strided_caches_are_written_in_place(layout, backend, device):
    q, k, v = tensors(device)
    lengths = torch.tensor([2, 9], dtype=torch.int32, device=device)

    def empty():
        made = {
            "heads first": k.new_zeros(2, 2, 12, 16).transpose(1, 2),
            "every second": k.new_zeros(2, 24, 2, 16)[:, ::2],
            "offset": k.new_zeros(2, 13, 3, 17)[:, 1:, 1:, 1:],
        }
        return made[layout]

    def run(k_cache, v_cache):
        k_cache.copy_(k), v_cache.copy_(v)
        options = {"k": k[:, :3], "v": v[:, :3], "cache_seqlens": lengths, "causal": "bottom_right", "backend": backend}
        return functional.attention_kvcache(q[:, :3], k_cache, v_cache, **options), k_cache, v_cache

    for strange, plain in zip(run(empty(), empty()), run(k.clone(), k.clone()), strict=True):
        torch.testing.assert_close(strange, plain)


@pytest.mark.parametrize("lengths", ("int", "tensor", "paged"))
def test_compile_fullgraph_equals_eager_append_included(lengths, backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("triton: an interpreted kernel cannot be traced into a compiled graph's runtime checks")
    torch._dynamo.reset()
    q, k, v = tensors(device)
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32, device=device)
    angles = torch.arange(24.0, device=device)[:, None] / torch.arange(1.0, 9.0, device=device)

    def step(q, k_cache, v_cache, k, v, cache_seqlens):
        return functional.attention_kvcache(
            q, k_cache, v_cache, k=k, v=v, cache_seqlens=cache_seqlens, causal="bottom_right", return_lse=True,
            block_table=table if lengths == "paged" else None, rotary=(angles.cos(), angles.sin()), backend=backend,
        )  # fmt: skip

    def run(function):
        shape = (4, 6, 2, 16) if lengths == "paged" else (2, 12, 2, 16)
        k_cache, v_cache = k.new_full(shape, GARBAGE), k.new_full(shape, GARBAGE)
        found = []
        for i in range(5):
            now = slice(2 * i, 2 * i + 2)
            at = 2 * i if lengths == "int" else torch.full((2,), 2 * i, dtype=torch.int32, device=device)
            found.append(function(q[:, now], k_cache, v_cache, k[:, now], v[:, now], at))
        return found, k_cache, v_cache

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(step), equal_nan=True)


def test_twice_run_is_bitwise_equal(backend, device):
    q, k, v = tensors(device, rows=50)
    lengths = torch.tensor([50, 31], dtype=torch.int32, device=device)
    call = lambda **options: functional.attention_kvcache(q, k, v, cache_seqlens=lengths, backend=backend, **options)
    assert torch.equal(call(), call(deterministic=True))


@pytest.mark.parametrize("name", ("split", "paged", "prefill"))
def test_bitwise_equal_for_any_thread_count(name, backend, device):
    if backend != "cpu":
        pytest.skip(f"{backend}: does not run on this library's threads")
    threads, results = torch.get_num_threads(), []
    case = next(case for case in forward_cases.test_cases() if case.name == name and case.dtype == torch.float32)
    inputs = forward_cases.make_inputs(case, device)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(forward_cases.call(case, inputs, backend))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


def test_lengths_and_pages_out_of_range_stay_within_the_tensors(backend, device):
    """Nobody looks at them on a GPU: a wrong sequence must neither read elsewhere nor disturb the others."""
    if not backend.startswith("cuda"):
        pytest.skip(f"{backend}: such values do not arrive there")
    q, k, v = (x.transpose(1, 2) for x in tensors(device, batch=3))
    ints = lambda *values: torch.tensor(values, dtype=torch.int32, device=device)
    raw = getattr(torch.ops, f"llmkernels_{backend.replace('-', '_')}").attention_kvcache_fwd
    rest = (0.25, -1, 0, False, 0.0)
    right = raw(q, k, v, None, None, ints(7, 7, 7), None, *rest)[0]
    for lengths in ((7, 100_000, -5), (7, 2**31 - 1, -(2**31))):
        out = raw(q, k, v, None, None, ints(*lengths), None, *rest)[0]
        torch.testing.assert_close(out[0], right[0])
        out = raw(q, k, v, None, None, ints(*lengths), ints([0], [1], [2]), *rest)[0]
        torch.testing.assert_close(out[0], right[0])
    for pages in ((0, 3, -1), (0, 2**31 - 1, -(2**31))):
        out = raw(q, k, v, None, None, ints(7, 7, 7), ints(*pages)[:, None], *rest)[0]
        torch.testing.assert_close(out[0], right[0])


def test_raw_op_says_what_is_wrong(backend, device):
    if backend in ("torch", "triton"):
        pytest.skip(f"{backend}: only the public function checks, and nothing is read through a pointer of ours")
    q, k, v = (x.transpose(1, 2) for x in tensors(device))
    lengths, table = (torch.ones(shape, dtype=torch.int32, device=device) for shape in ((2,), (2, 1)))
    raw = getattr(torch.ops, f"llmkernels_{backend.replace('-', '_')}").attention_kvcache_fwd
    call = lambda q=q, k=k, v=v, slopes=None, sinks=None, seqlens=lengths, pages=None: raw(
        q, k, v, slopes, sinks, seqlens, pages, 0.25, -1, -1, False, 0.0
    )
    wrong = (
        lambda: call(q=q[0]),
        lambda: call(k=k[..., :8]),
        lambda: call(k=k[:1], v=v[:1]),
        lambda: call(v=v[:, :1]),
        lambda: call(v=v[:, :, :5]),
        lambda: call(k=k.half()),
        lambda: call(q=q[:, :3]),
        lambda: call(seqlens=lengths[:1]),
        lambda: call(seqlens=lengths.long()),
        lambda: call(seqlens=None, pages=table),
        lambda: call(pages=table[:1]),
        lambda: call(pages=table.long()),
        lambda: call(slopes=torch.ones(3, device=device)),
        lambda: call(sinks=torch.ones(2, 4, device=device)),
    )
    for wrong_call in wrong:
        with pytest.raises((ValueError, TypeError), match="expected|missing"):
            wrong_call()


def test_raw_op_passes_opcheck(backend, device):
    q, k, v = (x.transpose(1, 2) for x in tensors(device))
    lengths = torch.tensor([5, 12], dtype=torch.int32, device=device)
    table = torch.tensor([[0], [1]], dtype=torch.int32, device=device)
    namespace = getattr(torch.ops, f"llmkernels_{backend.replace('-', '_')}")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for seqlens, pages in ((None, None), (lengths, None), (lengths, table)):
        given = (q, k, v, None, None, seqlens, pages, 0.25, -1, 0, False, 0.0)
        torch.library.opcheck(namespace.attention_kvcache_fwd.default, given, test_utils=tests)


def test_public_op_appends_and_is_checked():
    q, k, v = tensors("cpu")
    lengths = torch.tensor([0, 3], dtype=torch.int32)
    angles = torch.arange(15.0)[:, None] / torch.arange(1.0, 9.0)
    options = {"k": k[:, :4], "v": v[:, :4], "cache_seqlens": lengths, "causal": "bottom_right"}
    with llmkernels.use_backend("torch"):
        mine, theirs = (k.clone(), v.clone()), (k.clone(), v.clone())
        out = torch.ops.llmkernels.attention_kvcache(
            q, *mine, **options, rotary_cos=angles.cos(), rotary_sin=angles.sin(), rotary_interleaved=True
        )
        rotary = (angles.cos(), angles.sin(), True)
        expected = functional.attention_kvcache(q, *theirs, **options, rotary=rotary, return_lse=True)
        torch.testing.assert_close((out, mine), (expected, theirs))
        public = torch.ops.llmkernels.attention_kvcache.default
        torch.library.opcheck(public, (q, *mine), options, test_utils=("test_schema", "test_faketensor"))
        with pytest.raises(TypeError, match=r"rotary is \('Tensor', 'NoneType', 'bool'\)"):
            torch.ops.llmkernels.attention_kvcache(q, *mine, **options, rotary_cos=angles.cos())


def test_export_is_portable():
    class Step(torch.nn.Module):
        def forward(self, q, k_cache, v_cache, k, v, lengths):
            return functional.attention_kvcache(
                q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths, causal="bottom_right"
            )

    q, k, v = tensors("cpu")
    lengths = torch.tensor([0, 3], dtype=torch.int32)
    given = lambda: (q[:, :2], k.clone(), v.clone(), k[:, :2], v[:, :2], lengths)
    program = torch.export.export(Step(), given())
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "llmkernels.attention_kvcache_fwd.default" in names
    assert not any("llmkernels_" in name for name in names)
    with llmkernels.use_backend("torch"):
        exported, eager = given(), given()
        torch.testing.assert_close(program.module()(*exported), Step()(*eager))
        torch.testing.assert_close(exported, eager)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_bad_arguments_have_one_clear_message_and_nothing_is_written():
    q, k, v = tensors("cpu")
    ints = lambda *values: torch.tensor(values, dtype=torch.int32)
    caches = (k.clone(), v.clone())
    pages = (k.reshape(6, 4, 2, 16).clone(), v.reshape(6, 4, 2, 16).clone())
    new = {"k": k[:, :3], "v": v[:, :3]}
    table = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32)
    cos = torch.ones(12, 8)
    call = lambda query=q, k_cache=caches[0], v_cache=caches[1], **options: functional.attention_kvcache(
        query, k_cache, v_cache, **options
    )
    paged = lambda table, **options: call(k_cache=pages[0], v_cache=pages[1], block_table=table, **options)
    wrong = [
        (ValueError, r"cache_seqlens\[1\] is 10 and 3 keys are appended, expected no more than 12, the cache",
         lambda: call(**new, cache_seqlens=ints(0, 10))),
        (ValueError, r"cache_seqlens\[0\] is 10 and 3 keys", lambda: call(**new, cache_seqlens=10)),
        (ValueError, r"cache_seqlens\[1\] is 10 and 3 keys", lambda: paged(table, **new, cache_seqlens=ints(0, 10))),
        (ValueError, r"cache_seqlens\[1\] is 13, expected no more than 12", lambda: call(cache_seqlens=ints(0, 13))),
        (ValueError, r"cache_seqlens\[0\] is -1, expected 0 or more", lambda: call(**new, cache_seqlens=ints(-1, 2))),
        (ValueError, "cache_seqlens is missing, expected the lengths", lambda: call(**new)),
        (ValueError, r"cache_seqlens has shape \(3,\), expected \(2,\)", lambda: call(cache_seqlens=ints(1, 2, 3))),
        (TypeError, "cache_seqlens has dtype torch.int64, expected torch.int32",
         lambda: call(cache_seqlens=torch.tensor([1, 2]))),
        (TypeError, "cache_seqlens is 1.5, expected an int", lambda: call(cache_seqlens=1.5)),
        (ValueError, r"block_table\[1, 0\] is 6, expected a page between 0 and 5",
         lambda: paged(torch.tensor([[0], [6]], dtype=torch.int32), **new, cache_seqlens=0)),
        (ValueError, r"block_table\[0, 1\] is -1, expected a page",
         lambda: paged(torch.tensor([[0, -1], [1, 2]], dtype=torch.int32), **new, cache_seqlens=ints(2, 0))),
        (TypeError, "block_table has dtype torch.int64", lambda: paged(table.long(), **new, cache_seqlens=0)),
        (ValueError, r"block_table has shape \(1, 3\), expected \(2, pages", lambda: paged(table[:1], cache_seqlens=0)),
        (ValueError, r"k_cache has strides \(0, 32, 16, 1\), expected memory of its own for each element",
         lambda: call(k_cache=caches[0][:1].expand(2, -1, -1, -1), **new, cache_seqlens=0)),
        (ValueError, "k is given without v", lambda: call(k=k, cache_seqlens=0)),
        (ValueError, r"query has shape \(2, 12, 64\), expected \(batch, length", lambda: call(q.flatten(2))),
        (ValueError, r"k_cache has shape \(2, 12, 2, 8\), expected \(2, 12, 2, 16\), with the head_dim of query",
         lambda: call(k_cache=k[..., :8])),
        (ValueError, r"v_cache has shape \(2, 11, 2, 16\), expected \(2, 12, 2, 16\)", lambda: call(v_cache=v[:, 1:])),
        (ValueError, "k_cache has shape .1, 12, 2, 16., expected .2, 12, 2, 16., with the batch of query",
         lambda: call(k_cache=k[:1], v_cache=v[:1])),
        (ValueError, "query has 3 heads, expected a multiple of 2", lambda: call(q[:, :, :3])),
        (ValueError, r"k has shape \(1, 12, 2, 16\), expected \(2, 12, 2, 16\)",
         lambda: call(k=k[:1], v=v[:1], cache_seqlens=0)),
        (ValueError, r"v has shape \(2, 3, 2, 8\), expected \(2, 3, 2, 16\)",
         lambda: call(k=k[:, :3], v=v[:, :3, :, :8], cache_seqlens=0)),
        (TypeError, "k has dtype torch.float16, expected torch.float32",
         lambda: call(k=k[:, :3].half(), v=v[:, :3], cache_seqlens=0)),
        (ValueError, "v_cache is on meta, expected cpu", lambda: call(v_cache=v.to("meta"))),
        (ValueError, "window is .-2, 0., expected", lambda: call(**new, cache_seqlens=0, window=(-2, 0))),
        (ValueError, "softcap is -1.0, expected", lambda: call(**new, cache_seqlens=0, softcap=-1.0)),
        (ValueError, "causal is True, expected 'top_left'", lambda: call(**new, cache_seqlens=0, causal=True)),
        (ValueError, r"alibi_slopes has shape \(3,\)",
         lambda: call(**new, cache_seqlens=0, alibi_slopes=torch.ones(3))),
        (ValueError, r"sinks has shape \(2, 4\)", lambda: call(**new, cache_seqlens=0, sinks=torch.ones(2, 4))),
        (ValueError, "rotary is given without k and v", lambda: call(cache_seqlens=0, rotary=(cos, cos))),
        (TypeError, "rotary is Tensor, expected tensors", lambda: call(**new, cache_seqlens=0, rotary=cos)),
        (TypeError, r"rotary is \('Tensor', 'Tensor', 'str'\)",
         lambda: call(**new, cache_seqlens=0, rotary=(cos, cos, "half"))),
        (ValueError, r"cos has shape \(12, 9\), expected \(positions, pairs\) and no more than 8",
         lambda: call(**new, cache_seqlens=0, rotary=(torch.ones(12, 9),) * 2)),
        (ValueError, r"sin has shape \(12, 7\), expected \(12, 8\)",
         lambda: call(**new, cache_seqlens=0, rotary=(cos, cos[:, :7]))),
        (ValueError, "cos has 5 positions, expected at least 7",
         lambda: call(q[:, :2], **new, cache_seqlens=ints(4, 0), rotary=(cos[:5], cos[:5]))),
        (ValueError, "cos has 12 positions, expected at least 16",
         lambda: call(**new, cache_seqlens=4, rotary=(cos, cos), causal="bottom_right")),
        (ValueError, "query requires a gradient, expected none", lambda: call(q.clone().requires_grad_())),
        (ValueError, "sinks requires a gradient", lambda: call(sinks=torch.ones(4, requires_grad=True))),
        (ValueError, "v requires a gradient",
         lambda: call(k=k[:, :3], v=v[:, :3].clone().requires_grad_(), cache_seqlens=0)),
        (ValueError, "a torch.func transform", lambda: torch.func.grad(lambda x: call(x).sum())(q)),
        (llmkernels.NoBackendError, "cuda: input is on the CPU", lambda: call(**new, cache_seqlens=0, backend="cuda")),
    ]  # fmt: skip
    for error, message, wrong_call in wrong:
        with pytest.raises(error, match="^attention_kvcache: .*" + message):
            wrong_call()
    for cache, old in zip((*caches, *pages), (k, v, k.reshape(6, 4, 2, 16), v.reshape(6, 4, 2, 16)), strict=True):
        assert torch.equal(cache, old)


def test_values_that_nobody_looked_at_reach_nothing_else(monkeypatch):
    """As on a GPU, where looking would wait for it: an index out of range is an error of torch's, or a NaN."""
    monkeypatch.setattr(llmkernels.ops.attention.arguments, "values_are_checked", lambda tensor: False)
    q, k, v = tensors("cpu")
    ints = lambda *values: torch.tensor(values, dtype=torch.int32)
    new = {"k": k[:, :2], "v": v[:, :2], "backend": "torch"}
    pages = (k.reshape(6, 4, 2, 16).clone(), v.reshape(6, 4, 2, 16).clone())
    before = pages[0].clone()
    for table, lengths in (([[0], [-1]], (0, 0)), ([[0], [6]], (0, 0)), ([[0], [1]], (0, 3)), ([[0], [1]], (0, 9))):
        with pytest.raises((IndexError, RuntimeError), match="out of (bounds|range)"):
            functional.attention_kvcache(q, *pages, **new, cache_seqlens=ints(*lengths), block_table=ints(*table))
    with pytest.raises(IndexError, match="out of bounds"):
        functional.attention_kvcache(q, k.clone(), v.clone(), **new, cache_seqlens=ints(0, 11))
    assert torch.equal(pages[0], before)
    cos = torch.ones(4, 8)
    k_cache = k.clone()
    with pytest.raises(ValueError, match="rope: positions has 4, but cos and sin have 4 rows"):  # NaN on a GPU
        functional.attention_kvcache(q, k_cache, v.clone(), **new, cache_seqlens=ints(0, 3), rotary=(cos, cos))
    assert torch.equal(k_cache, k)


def test_explain_writes_nothing():
    q, k, v = tensors("cpu")
    k_cache, v_cache = k.clone(), v.clone()
    explained = llmkernels.explain(OP, q[:, :1], k_cache, v_cache, k=q[:, :1, :2], v=q[:, :1, 2:], cache_seqlens=4)
    assert list(explained.reasons)[-1] == "torch" and explained.chosen is not None
    assert torch.equal(k_cache, k) and torch.equal(v_cache, v)


def test_no_grad_lets_parameters_through():
    q, k, v = tensors("cpu")
    with torch.no_grad():
        out = functional.attention_kvcache(q.requires_grad_(), k, v, backend="torch")
    assert not out.requires_grad


# --- merge_attention ------------------------------------------------------------------------------------------------


def halves(dtype=torch.float64, keys=11, cut=4):
    """(q, k, v, sizes) and a function that attends to a slice of the keys."""
    generator = torch.Generator().manual_seed(11)
    q, k, v = (
        torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (5, keys, keys)
    )

    def attend(part, **options):
        return functional.scaled_dot_product_attention(
            q, k[:, :, part], v[:, :, part], return_lse=True, backend="torch", **options
        )

    return (q, k, v), attend, slice(0, cut), slice(cut, keys)


def gradients(results, leaves):
    generator = torch.Generator().manual_seed(12)
    arriving = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
    return torch.autograd.grad(results, leaves, arriving)


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_merge_equals_the_whole_and_so_do_its_gradients(dtype):
    leaves, attend, first, second = halves(dtype)
    whole, merged = attend(slice(None)), functional.merge_attention(*attend(first), *attend(second))
    assert [x.dtype for x in merged] == [x.dtype for x in whole]
    near = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(merged, whole, **near)
    torch.testing.assert_close(gradients(merged, leaves), gradients(whole, leaves), **near)


def test_merge_with_sinks_in_one_of_the_calls():
    leaves, attend, first, second = halves()
    sinks = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    whole, merged = (
        attend(slice(None), sinks=sinks),
        functional.merge_attention(*attend(first, sinks=sinks), *attend(second)),
    )
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(gradients(merged, (*leaves, sinks)), gradients(whole, (*leaves, sinks)))


def test_merge_of_parts_without_keys():
    leaves, attend, _, _ = halves()
    for order in ("empty last", "empty first", "garbage last"):
        whole, empty = attend(slice(None)), attend(slice(0, 0))
        garbage = torch.full_like(empty[0], GARBAGE), empty[1]
        parts = {"empty last": (*whole, *empty), "empty first": (*empty, *whole), "garbage last": (*whole, *garbage)}
        merged = functional.merge_attention(*parts[order])
        torch.testing.assert_close(merged, whole)
        torch.testing.assert_close(gradients(merged, leaves), gradients(attend(slice(None)), leaves))
    tensors = [x.detach().requires_grad_() for x in (*empty, *garbage)]
    out, lse = functional.merge_attention(*tensors)
    assert bool((out == 0.0).all()) and bool((lse == -torch.inf).all())
    assert not any(bool(grad.any()) for grad in gradients((out, lse), tensors))


def test_merge_of_large_scores_and_nan():
    lse = torch.tensor([[1e4, -1e4, 3e38]])
    ones = torch.ones(1, 3, 2)
    out, total = functional.merge_attention(ones, lse, 3.0 * ones, lse)
    assert torch.equal(out, 2.0 * ones) and torch.equal(total, lse + torch.tensor(2.0).log())
    out, total = functional.merge_attention(ones, lse, ones, torch.full_like(lse, GARBAGE))
    assert bool(out.isnan().all()) and bool(total.isnan().all())


def test_merge_is_differentiable_in_every_way():
    generator = torch.Generator().manual_seed(13)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    given = normal(1, 2, 3, 2), normal(1, 3, 2), normal(1, 2, 3, 2), normal(1, 3, 2)
    function = lambda *tensors: functional.merge_attention(*tensors, seq_dim=-3)
    assert torch.autograd.gradcheck(function, given) and torch.autograd.gradgradcheck(function, given)
    public = lambda *tensors: torch.ops.llmkernels.merge_attention(*tensors, seq_dim=-3)
    torch.testing.assert_close(public(*given), function(*given))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled(*given), given), gradients(function(*given), given))
    assert llmkernels.explain("merge_attention", *given, seq_dim=-3).chosen == "torch"


def test_merge_says_what_is_wrong():
    out, lse = torch.ones(2, 3, 5, 4), torch.ones(2, 3, 5)
    call = functional.merge_attention
    wrong = [
        (ValueError, r"lse1 has shape \(2, 3, 5\), expected \(2, 5, 3\) for out1 \(2, 3, 5, 4\) with seq_dim=-3",
         lambda: call(out, lse, out, lse, seq_dim=-3)),
        (ValueError, r"lse2 has shape \(2, 3\), expected \(2, 3, 5\)", lambda: call(out, lse, out, lse[..., 0])),
        (ValueError, r"out2 has shape \(2, 3, 5, 2\), expected \(2, 3, 5, 4\)",
         lambda: call(out, lse, out[..., :2], lse)),
        (ValueError, "seq_dim is 1, expected -2", lambda: call(out, lse, out, lse, seq_dim=1)),
        (ValueError, "lse2 is on meta", lambda: call(out, lse, out, lse.to("meta"))),
        (TypeError, "lse1 has dtype torch.float64, expected torch.float32", lambda: call(out, lse.double(), out, lse)),
        (TypeError, "out2 has dtype torch.float16", lambda: call(out, lse, out.half(), lse)),
        (ValueError, "out1 has shape .4,., expected at least 2", lambda: call(out[0, 0, 0], lse, out[0, 0, 0], lse)),
        (llmkernels.NoBackendError, "merge_attention: backend 'cpu' cannot run", lambda: call(out, lse, out, lse,
                                                                                             backend="cpu")),
    ]  # fmt: skip
    for error, message, wrong_call in wrong:
        with pytest.raises(error, match=message):
            wrong_call()


def test_attention_to_two_lengths_apart_is_what_math_says():
    """merge_attention with keys of value 0 and 1: the weight of the second part."""
    q = torch.zeros(1, 1, 1, 4)
    parts = [
        functional.scaled_dot_product_attention(
            q, torch.zeros(1, 1, n, 4), torch.full((1, 1, n, 1), value), return_lse=True, backend="torch"
        )
        for n, value in ((3, 0.0), (5, 1.0))
    ]
    out, lse = functional.merge_attention(*parts[0], *parts[1])
    assert math.isclose(out.item(), 5 / 8, rel_tol=1e-6) and math.isclose(lse.item(), math.log(8), rel_tol=1e-6)
