"""Static and paged caches of keys and values in transformers' generate(): token for token, in every way to generate."""

import itertools

import pytest
import torch

transformers = pytest.importorskip("transformers")

import llmkernels  # noqa: E402
from llmkernels import registry  # noqa: E402
from llmkernels.huggingface import PagedCache, StaticCache  # noqa: E402
from tests.hf_models import FAMILIES, PAD, VOCABULARY, output_of  # noqa: E402

DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]
SEQ2SEQ = [name for name, family in FAMILIES.items() if family.kind == "seq2seq"]
NEW = 10
KINDS = {"static": lambda model: StaticCache(model, 24), "paged": lambda model: PagedCache(model, 60, 4)}
both = pytest.mark.parametrize("kind", KINDS)


def prompts():
    """Two rows, the second padded on its left."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = PAD, 0
    return ids, mask


def greedy(model, ids, mask, cache=None, **options):
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


def logits(model, ids, cache, mask=None, **options):
    with torch.no_grad():
        return model(ids, past_key_values=cache, attention_mask=mask, **options).logits


def accelerated(name="llama", **options):
    model = FAMILIES[name].make(**options)
    llmkernels.accelerate(model)
    return model


# --- token for token --------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", DECODERS)
def test_equals_generate_with_the_models_own_cache(name, kind):
    """Sliding windows of 5 are passed by all prompts; padding, one row alone, beams; through the cache kernel alone."""
    model, (ids, mask) = FAMILIES[name].make(), prompts()
    calls = [(ids, mask, {}), (ids[:1], mask[:1], {}), (ids, mask, {"num_beams": 3})]
    expected = [greedy(model, *call, **options) for *call, options in calls]
    assert torch.equal(greedy(model, ids, mask, KINDS[kind](model)), expected[0]), "a model that is not accelerated"
    llmkernels.accelerate(model)
    for (*call, options), tokens in zip(calls, expected, strict=True):
        ran = []
        with registry.observe(lambda op, *_, ran=ran: ran.append(op)):
            assert torch.equal(greedy(model, *call, KINDS[kind](model), **options), tokens)
        assert "scaled_dot_product_attention" not in ran
        assert ran.count("attention_kvcache") == NEW * 2, "of two layers, every step"


@both
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoders(name, kind):
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    del inputs["decoder_input_ids"]
    options = {"max_new_tokens": NEW, "do_sample": False, **inputs}
    expected = [model.generate(**options, num_beams=beams) for beams in (1, 3)]
    for change in (lambda model: None, llmkernels.accelerate):
        change(model)
        for beams, tokens in zip((1, 3), expected, strict=True):
            cache = transformers.EncoderDecoderCache(KINDS[kind](model), KINDS[kind](model))
            assert torch.equal(model.generate(**options, num_beams=beams, past_key_values=cache), tokens)


@both
@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt_oss"))
def test_bf16_where_the_best_two_logits_differ(name, kind):
    """Teacher forced: as far from fp32 as the model's own cache is, and the same choice where it is one."""
    model, (ids, mask) = FAMILIES[name].make(), prompts()
    tokens = greedy(model, ids, mask)
    whole = torch.cat((mask, torch.ones(2, NEW, dtype=torch.long)), 1)
    truth = logits(model, tokens, None, whole)[:, 8:]
    model = model.to(torch.bfloat16)
    own = logits(model, tokens, None, whole)[:, 8:].float()
    llmkernels.accelerate(model)
    cache = KINDS[kind](model)
    found = [logits(model, ids, cache, mask)[:, -1:]]
    for at in range(9, tokens.shape[1]):
        positions = whole[:, : at + 1].cumsum(1)[:, -1:] - 1
        found.append(logits(model, tokens[:, at : at + 1], cache, whole[:, : at + 1], position_ids=positions))
    found = torch.cat(found, 1).float()
    off, own_off = (found - truth).abs().amax(-1), (own - truth).abs().amax(-1)
    assert (off <= 2.0 * own_off.max()).all()
    best = truth.topk(2).values
    clear = best[..., 0] - best[..., 1] > 2.0 * off
    assert clear.sum() > 5 and torch.equal(found.argmax(-1)[clear], truth.argmax(-1)[clear])


@both
def test_other_ways_to_generate(kind):
    """In chunks of a prompt, one of which is padding alone; by looking ahead, which forgets what it did not take."""
    model, (ids, mask) = FAMILIES["mistral"].make(), prompts()
    expected, alone = greedy(model, ids, mask), greedy(model, ids[:1], mask[:1])
    llmkernels.accelerate(model)
    assert torch.equal(greedy(model, ids, mask, KINDS[kind](model), prefill_chunk_size=3), expected)
    found = greedy(model, ids[:1], mask[:1], KINDS[kind](model), prompt_lookup_num_tokens=2)
    assert torch.equal(found, alone)


@both
def test_autocast(kind):
    """Turned queries and keys are then of another dtype than values."""
    model, (ids, mask) = accelerated(), prompts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(model, ids, transformers.DynamicCache(config=model.config), mask)
        cache = KINDS[kind](model)
        assert torch.equal(logits(model, ids, cache, mask)[:, 4:], expected[:, 4:])
    assert cache.layers[0].key_store.dtype == torch.float32 and cache.layers[0].value_store.dtype == torch.bfloat16


@both
def test_accelerated_and_restored_in_between(kind):
    """Padding is not stored then, and is where an attention that is not ours expects it."""
    (ids, mask), more = prompts(), torch.tensor([[7], [8]])
    model = FAMILIES["gemma3"].make()
    after = torch.cat((mask, torch.ones_like(more)), 1)
    own = transformers.DynamicCache(config=model.config)
    first, second = logits(model, ids, own, mask)[:, 4:], logits(model, more, own, after)
    for before, then in itertools.permutations((llmkernels.accelerate, llmkernels.restore)):
        before(model)
        cache = KINDS[kind](model)
        torch.testing.assert_close(logits(model, ids, cache, mask)[:, 4:], first, rtol=1e-4, atol=1e-5)
        assert cache.rows.padding == ([0, 4] if before is llmkernels.accelerate else None)
        then(model)
        torch.testing.assert_close(logits(model, more, cache, after), second, rtol=1e-4, atol=1e-5)


@both
def test_masks_that_say_more_than_the_cache_knows(kind):
    """Holes, padding on the right, a mask of four dimensions, weights that are asked for."""
    plain, model, (ids, mask) = FAMILIES["llama"].make(), accelerated(), prompts()
    holes = mask.clone()
    holes[0, 3], holes[1, -2] = 0, 0
    four = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril().logical_and(holes[:, None, None].bool())
    seen = holes[:, None].bool() & torch.ones(9, 9, dtype=torch.bool).tril()
    for given in (holes, four):
        expected = logits(plain, ids, transformers.DynamicCache(config=plain.config), given)
        found = logits(model, ids, KINDS[kind](model), given)
        kept = seen.any(-1)
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=1e-5)
    cache, own = KINDS[kind](model), transformers.DynamicCache(config=plain.config)
    after = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    logits(model, ids, cache, mask), logits(plain, ids, own, mask)
    torch.testing.assert_close(cache.layers[0].keys[1, :, 4:], own.layers[0].keys[1, :, 4:], rtol=1e-4, atol=1e-5)
    plain.set_attn_implementation("eager")
    hidden = after.clone()
    hidden[0, 2] = 0  # of what was seen before, now one less
    with torch.no_grad():
        found, expected = (
            each(ids[:, -1:], past_key_values=kept, attention_mask=hidden, output_attentions=True)
            for each, kept in ((model, cache), (plain, own))
        )
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.attentions[1], expected.attentions[1], rtol=1e-4, atol=1e-5)


def test_whoever_asks_gets_the_tensors(monkeypatch):
    """A model that looks at keys and mask before its attention does."""
    from transformers.models.llama import modeling_llama

    plain, model, (ids, mask) = FAMILIES["llama"].make(), accelerated(), prompts()
    expected = output_of(plain, {"input_ids": ids, "attention_mask": mask})
    usual, seen = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface, []

    def get_interface(name, default):
        def attend(module, query, key, value, attention_mask, **options):
            seen.append((key.shape, value.mean().dtype, attention_mask.shape, attention_mask.dtype))
            key, value, attention_mask = 1.0 * key, torch.cat((value[..., :4], value[..., 4:]), -1), ~~attention_mask
            return usual(name, default)(module, query, key, value, attention_mask, **options)

        return attend

    monkeypatch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", get_interface)
    found = logits(model, ids, StaticCache(model, 12), mask)
    torch.testing.assert_close(found[:, 4:], expected[:, 4:], rtol=1e-4, atol=1e-5)
    assert seen == [((2, 2, 9, 8), torch.float32, (2, 1, 9, 9), torch.bool)] * 2


@pytest.mark.parametrize("kind", (*KINDS, "dynamic"))
def test_compiled_whole(kind):
    """A compiler gets real keys and masks, whoever's the cache is."""
    model, (ids, mask) = accelerated(), prompts()
    own = lambda: transformers.DynamicCache(config=model.config)
    cache, expected = own() if kind == "dynamic" else KINDS[kind](model), own()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for new, seen in ((ids, mask), (ids[:, :1], torch.cat((mask, mask[:, -1:]), 1))):
        a, b = logits(compiled, new, cache, seen), logits(model, new, expected, seen)
        torch.testing.assert_close(a[:, -1], b[:, -1], rtol=1e-4, atol=1e-5)
