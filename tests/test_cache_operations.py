"""What happens to a cache between two tokens: cropped, copied, rows taken apart, too small; and what it refuses."""

import copy
import random

import pytest
import torch

transformers = pytest.importorskip("transformers")

import llmkernels  # noqa: E402
from llmkernels.huggingface import PagedCache, StaticCache  # noqa: E402
from llmkernels.huggingface.pages import Pages  # noqa: E402
from tests.hf_models import FAMILIES, VOCABULARY  # noqa: E402
from tests.test_caches import KINDS, accelerated, both, greedy, logits, prompts  # noqa: E402

CONFIG = FAMILIES["gemma3"].make().config  # a layer with a window and one without


def states(batch, new, seed):
    return torch.randn(2, batch, 2, new, 8, generator=torch.Generator().manual_seed(seed))


def append(cache, new, layers=(0, 1)):
    return [cache.update(*new, layer) for layer in layers]


def stored(cache):
    return torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers])


@both
def test_against_a_dynamic_cache_under_random_operations(kind):
    """Rows in any order, more and fewer of them, cropped, appended to: what is stored is what transformers' has."""
    for seed in range(6):
        draw = random.Random(seed)
        cache, own = KINDS[kind](CONFIG), transformers.DynamicCache()
        append(cache, states(2, 5, seed)), append(own, states(2, 5, seed))
        for step in range(12):
            batch, length = own.layers[0].keys.shape[0], own.get_seq_length()
            choice = draw.choice(("append", "append", "reorder", "select", "repeat", "crop"))
            if choice == "append" and length < 18:
                new = states(batch, draw.choice((1, 1, 3)), 100 * seed + step)
                append(cache, new), append(own, new)
            elif choice == "reorder":
                indices = torch.tensor([draw.randrange(batch) for _ in range(batch)])
                cache.reorder_cache(indices), own.reorder_cache(indices)
            elif choice == "select" and batch > 1:
                indices = torch.tensor(draw.sample(range(batch), batch - 1))
                cache.batch_select_indices(indices), own.batch_select_indices(indices)
            elif choice == "repeat" and batch < 4:
                cache.batch_repeat_interleave(2), own.batch_repeat_interleave(2)
            elif choice == "crop" and length > 3:
                cache.crop(-draw.choice((0, 1, 3))) or own.crop(cache.get_seq_length() - length)
            assert torch.equal(stored(cache), stored(own)), f"{choice}, step {step} of seed {seed}"
            assert cache.get_seq_length() == own.get_seq_length() and cache.batch_size == len(own.layers[0].keys)


@both
def test_one_prompt_for_several_answers(kind):
    """A cache with the prompt is copied, or its row is repeated, and each goes on by itself; then it is used again."""
    model, (ids, _) = accelerated(), prompts()
    prompt, first, second = ids[:1, :6], ids[:1], torch.cat((ids[:1, :6], ids[1:, 6:]), 1)
    ones = torch.ones(1, 9, dtype=torch.long)
    expected = [greedy(model, each, ones) for each in (first, second)]
    cache = KINDS[kind](model)
    logits(model, prompt, cache)
    for each, tokens in zip((first, second), expected, strict=True):
        own = copy.deepcopy(cache)
        assert torch.equal(greedy(model, each, ones, own), tokens)
        assert kind == "static" or own.pages.stores[0] is own.layers[0].key_store is not cache.layers[0].key_store
        assert cache.get_seq_length() == 6
    cache.batch_repeat_interleave(2)
    if kind == "paged":
        assert cache.pages.users.count(2) == 2 and len(cache.pages.free) == 58, "shared until written into"
    both_rows = torch.cat((first, second))
    assert torch.equal(greedy(model, both_rows, ones.repeat(2, 1), cache), torch.cat(expected))
    cache.reset()
    assert cache.get_seq_length() == 0 and (kind == "static" or len(cache.pages.free) == 60)
    assert torch.equal(greedy(model, first, ones, cache), expected[0]), "of another batch than before"
    cache.reset()
    halves = states(1, 1, 0).half()
    if kind == "static":
        append(cache, halves)
        assert stored(cache).dtype == torch.float16
    else:
        with pytest.raises(TypeError, match="PagedCache: keys have dtype torch.float16, expected torch.float32"):
            append(cache, halves)


@both
def test_padding_goes_along_with_its_row(kind):
    model, (ids, mask) = accelerated(), prompts()
    cache, own = KINDS[kind](model), transformers.DynamicCache(config=model.config)
    logits(model, ids, cache, mask), logits(model, ids, own, mask)
    cache.reorder_cache(torch.tensor([1, 0])), own.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2), own.batch_repeat_interleave(2)
    cache.crop(-2), own.crop(-2)
    assert cache.rows.padding == [4, 4, 0, 0]
    more = torch.randint(3, VOCABULARY, (4, 3), generator=torch.Generator().manual_seed(5))
    after = torch.cat((mask[[1, 1, 0, 0], :7], torch.ones(4, 3, dtype=torch.long)), 1)
    found, expected = (logits(model, more, each, after) for each in (cache, own))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    without = logits(model, more[:, :1], cache)  # no mask: the padding stays hidden all the same
    again = logits(model, more[:, :1], own, torch.cat((after, torch.ones(4, 1, dtype=torch.long)), 1))
    torch.testing.assert_close(without, again, rtol=1e-4, atol=1e-5)
    cache.crop(-12)
    assert cache.get_seq_length() == 0 and cache.rows.padding is None
    logits(model, ids, cache)
    assert cache.get_seq_length() == 9


@both
def test_too_small_is_one_error_and_changes_nothing(kind):
    model, (ids, mask) = accelerated(), prompts()
    expected = greedy(model, ids, mask, max_new_tokens=4)
    if kind == "static":
        cache, message = StaticCache(model, 11), "StaticCache: 16 keys are to be kept, expected no more than 11"
    else:
        cache = PagedCache(model, 5, 4)
        message = "PagedCache: 2 more pages of 4 keys are needed for 2 rows of up to 16 keys, and 0 of 5 are free"
    logits(model, ids, cache, mask)
    for at in (10, 11):
        whole = torch.cat((mask, torch.ones(2, at - 9, dtype=torch.long)), 1)
        found = logits(model, expected[:, at - 1 : at], cache, whole, position_ids=whole.cumsum(1)[:, -1:] - 1)
        assert torch.equal(found[:, -1].argmax(-1), expected[:, at])
    before = stored(cache)
    with pytest.raises(ValueError, match=message):
        logits(model, torch.full((2, 5), 3), cache)
    assert torch.equal(stored(cache), before) and cache.get_seq_length() == 11


def test_pages_are_shared_and_given_back():
    pages = Pages(6, 4)
    assert pages.reserve([0, 0], [6, 2]) == [] and [len(row) for row in pages.of_rows] == [2, 1]
    pages.select([0, 0])
    assert pages.of_rows[0] == pages.of_rows[1] and len(pages.free) == 4
    shared = pages.of_rows[0][1]
    copies = pages.reserve([6, 6], [7, 7])
    assert [source for source, _ in copies] == [shared], "one copies, the other may keep it"
    assert pages.of_rows[0][0] == pages.of_rows[1][0] and pages.of_rows[0][1] != pages.of_rows[1][1]
    before = copy.deepcopy((pages.of_rows, pages.users, pages.free))
    with pytest.raises(
        ValueError, match=r"PagedCache: 4 more pages of 4 keys are needed for 2 rows .* 3 of 6 are free"
    ):
        pages.reserve([7, 7], [16, 16])
    assert (pages.of_rows, pages.users, pages.free) == before
    pages.crop([3, 7])
    pages.clear()
    assert sorted(pages.free) == list(range(6)) and pages.users == [0] * 6


@both
def test_bad_input_has_one_clear_message(kind):
    model, (ids, mask) = accelerated(), prompts()
    cache = KINDS[kind](model)
    name = type(cache).__name__
    logits(model, ids, cache, mask)
    shown = torch.ones(2, 10, dtype=torch.long)
    key = states(2, 1, 0)[0]
    before = stored(cache)
    wrong = [
        (ValueError, "attention_mask shows row 1 from place 0, expected no earlier than 4",
         lambda: logits(model, ids[:, :1], cache, shown)),
        (ValueError, f"{name}: keys require a gradient",
         lambda: model(ids[:, :1], past_key_values=cache, attention_mask=None)),
        (TypeError, f"{name}: keys have dtype torch.float64, expected torch.float32",
         lambda: cache.update(key.double(), key, 0)),
        (ValueError, r"keys have (batch, heads and head_dim \(3, 2, 8\)|a batch of 3)",
         lambda: cache.update(states(3, 1, 0)[0], states(3, 1, 0)[0], 0)),
        (ValueError, r"values have batch, heads and head_dim \(2, 2, 4\), expected \(2, 2, 8\)",
         lambda: cache.update(key, key[..., :4], 0)),
        (ValueError, f"{name}: tokens_to_remove is 2, expected 0 or a negative int", lambda: cache.crop(2)),
        (TypeError, f"{name}: got int, expected a model", lambda: type(cache)(3, 8)),
        (ValueError, f"{name}: .* is 0, expected an int, 1 or more", lambda: type(cache)(model, 0)),
        (ValueError, f"{name}: layer 0 is linear_attention, expected full_attention or sliding_attention",
         lambda: type(cache)(transformers.Qwen3NextConfig(num_hidden_layers=1), 8)),
        (ValueError, f"{name}: layer 0 is chunked_attention", lambda: type(cache)(transformers.Llama4TextConfig(), 8)),
    ]  # fmt: skip
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
        assert torch.equal(stored(cache), before)


@both
def test_generate_of_ours_with_every_cache(kind):
    model, (ids, mask) = FAMILIES["gemma2"].make(), prompts()
    expected = greedy(model, ids, mask)
    run = lambda cache, ids=ids, **options: llmkernels.generate(
        model, ids, attention_mask=mask, cache=cache, **{"max_new_tokens": 10} | options
    )
    seen = []
    handle = model.register_forward_hook(lambda *args: seen.append(type(args[-1].past_key_values)))
    assert torch.equal(run(None), expected) and torch.equal(run(kind), expected)
    assert seen[0] is transformers.DynamicCache and seen[-1] is {"static": StaticCache, "paged": PagedCache}[kind]
    llmkernels.accelerate(model)
    assert torch.equal(run(None), expected) and seen[-1] is StaticCache
    cache = KINDS[kind](model)
    assert torch.equal(run(cache, max_new_tokens=4), expected[:, :13]) and cache.get_seq_length() == 12
    cache.crop(-6)
    handle.remove()
    calls = []
    handle = model.register_forward_pre_hook(
        lambda m, args, kw: calls.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.equal(run(cache), expected)
    assert calls == [3] + [1] * 9, "of the prompt only what the cache has not"
    handle.remove()
    for error, message, given in (
        (ValueError, "generate: cache is 'huge', expected 'static', 'paged' or a cache", "huge"),
        (TypeError, "generate: cache is int, expected", 3),
        (ValueError, "generate: cache has 18 tokens, expected fewer than input_ids, 9", cache),
        (ValueError, "generate: cache has room for 12 tokens, expected 18", StaticCache(model, 12)),
    ):
        with pytest.raises(error, match=message):
            run(given)
    with pytest.raises(TypeError, match="generate: cache is 'static', expected None for Linear"):
        llmkernels.generate(torch.nn.Linear(2, 2), ids, cache="static")
