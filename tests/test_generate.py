"""generate(): token for token what transformers' own loop gives, and what it does beside that."""

import pytest
import torch

import llmkernels
from tests.hf_models import FAMILIES, PAD, VOCABULARY

DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]


def prompts():
    """Two rows, the second padded on its left."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = PAD, 0
    return ids, mask


@pytest.mark.parametrize("accelerated", (False, True), ids=("plain", "accelerated"))
@pytest.mark.parametrize("name", DECODERS)
def test_equals_the_models_own_generate(name, accelerated):
    model = FAMILIES[name].make()
    ids, mask = prompts()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    if accelerated:
        llmkernels.accelerate(model)
    assert torch.equal(llmkernels.generate(model, ids, attention_mask=mask, max_new_tokens=8), expected)
    alone = model.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(llmkernels.generate(model, ids[:1], max_new_tokens=8), alone)


def test_rows_end_at_stop_tokens_and_are_padded():
    model = FAMILIES["llama"].make()
    ids, mask = prompts()
    free = llmkernels.generate(model, ids, attention_mask=mask, max_new_tokens=10, stop_tokens=())
    assert free.shape == (2, 19)
    stop = int(free[0, 11])  # the third new token of the first row
    found = llmkernels.generate(model, ids, attention_mask=mask, max_new_tokens=10, stop_tokens=stop, pad_token=7)
    first = free[0, 9:].tolist().index(stop)
    assert found[0, 9 : 10 + first].tolist() == free[0, 9 : 10 + first].tolist()
    assert (found[0, 10 + first :] == 7).all()
    second = free[1, 9:].tolist()
    end = second.index(stop) + 1 if stop in second else 10
    assert found[1, 9 : 9 + end].tolist() == second[:end]
    both = llmkernels.generate(model, ids[:1].repeat(2, 1), max_new_tokens=10, stop_tokens=[stop])
    assert both.shape == (2, 10 + first) and (both[:, -1] == stop).all()
    model.generation_config.eos_token_id = stop
    assert torch.equal(llmkernels.generate(model, ids[:1], max_new_tokens=10), both[:1])


def test_tokens_are_told_one_by_one_and_can_be_stopped():
    model, (ids, _) = FAMILIES["gpt2"].make(), prompts()
    seen = []
    found = llmkernels.generate(model, ids, max_new_tokens=6, on_tokens=seen.append, stop_tokens=())
    assert torch.equal(torch.stack(seen, 1), found[:, 9:])
    few = llmkernels.generate(model, ids, max_new_tokens=6, on_tokens=lambda new: False, stop_tokens=())
    assert torch.equal(few, found[:, :10])
    assert torch.equal(llmkernels.generate(model, ids, max_new_tokens=0), ids)


def test_sampling_is_seeded_and_of_the_distribution_asked_for():
    model, (ids, _) = FAMILIES["qwen2"].make(), prompts()
    options = {"max_new_tokens": 12, "temperature": 3.0, "stop_tokens": ()}
    draw = lambda seed, **more: llmkernels.generate(
        model, ids, generator=torch.Generator().manual_seed(seed), **options, **more
    )
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    greedy = llmkernels.generate(model, ids, max_new_tokens=12, stop_tokens=())
    assert torch.equal(draw(3, top_k=1), greedy)


def test_a_prompt_without_padding_makes_no_mask():
    model, (ids, _) = FAMILIES["llama"].make(), prompts()
    seen = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    llmkernels.generate(model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, stop_tokens=())
    handle.remove()
    assert len(seen) == 3 and all("attention_mask" not in kwargs for kwargs in seen)
    assert [kwargs["input_ids"].shape[1] for kwargs in seen] == [9, 1, 1]


def test_no_gradient_is_recorded():
    model, (ids, _) = FAMILIES["llama"].make(), prompts()
    logits = []
    handle = model.register_forward_hook(lambda module, args, result: logits.append(result.logits))
    llmkernels.generate(model, ids, max_new_tokens=2)
    handle.remove()
    assert not any(part.requires_grad for part in logits)


def test_bad_input_has_one_clear_message():
    model, (ids, mask) = FAMILIES["llama"].make(), prompts()
    generate = llmkernels.generate
    right = torch.ones_like(ids)
    right[1, -1] = 0
    hole = torch.ones_like(ids)
    hole[1, 3] = 0
    wrong = [
        (TypeError, "generate: input_ids has dtype torch.float32", lambda: generate(model, ids.float())),
        (ValueError, r"input_ids has shape \(9,\), expected \[B, S\]", lambda: generate(model, ids[0])),
        (ValueError, r"input_ids has shape \(2, 0\)", lambda: generate(model, ids[:, :0])),
        (ValueError, r"attention_mask has shape \(1, 9\), expected \(2, 9\)",
         lambda: generate(model, ids, attention_mask=mask[:1])),
        (ValueError, "row 1 of attention_mask ends with 0", lambda: generate(model, ids, attention_mask=right)),
        (ValueError, "row 1 of attention_mask has a 0 after a 1", lambda: generate(model, ids, attention_mask=hole)),
        (ValueError, "max_new_tokens is -1", lambda: generate(model, ids, max_new_tokens=-1)),
        (ValueError, "stop_tokens is -2", lambda: generate(model, ids, stop_tokens=-2)),
        (ValueError, "sample: top_p is 0.0", lambda: generate(model, ids, top_p=0.0)),
        (ValueError, "T5ForConditionalGeneration is an encoder-decoder",
         lambda: generate(FAMILIES["t5"].make(), ids)),
        (TypeError, "without past_key_values, expected a causal language model",
         lambda: generate(FAMILIES["bert"].make(), ids)),
    ]  # fmt: skip
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
