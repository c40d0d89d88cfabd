"""Deliberately wrong attention, which the tolerance rule has to reject; test_attention_properties.py has what holds."""

import math
from dataclasses import replace

import pytest
import torch

from llmkernels import _random
from llmkernels.ops.attention import cases
from llmkernels.testing.battery import judge_results
from llmkernels.testing.inputs import outputs_and_gradients, short_name

SDPA = cases.OPS[0]
both_dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)


# --- deliberately wrong variants: the rule has to reject each of them -----------------------------------------------


def variant(case, inputs, *wrong):
    """(out, lse) by the definition in fp32, with the mistakes named in `wrong`."""
    is_wrong = lambda word: word in wrong
    wide = lambda x: None if x is None else x.float()
    q, k, v, slopes, sinks = map(wide, (inputs.q, inputs.k, inputs.v, inputs.alibi_slopes, inputs.sinks))
    mask = inputs.boolean_mask if inputs.mask is None else inputs.mask
    group, rows, keys = case.H // case.key_heads, case.S, case.T
    if is_wrong("heads interleaved"):
        k, v = (x.repeat(1, group, 1, 1) for x in (k, v))
    else:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scale = (1.01 if is_wrong("scale 1 % off") else 1.0) / math.sqrt(case.D)
    scores = q @ k.transpose(-1, -2) * scale
    i, j = torch.arange(rows)[:, None], torch.arange(keys)
    top_left = (case.causal == "top_left") != is_wrong("alignment swapped")
    center = i if top_left else i + keys - rows
    cap = lambda s: case.softcap * torch.tanh(s / case.softcap) if case.softcap else s
    scores = scores if is_wrong("softcap after the mask") else cap(scores)
    if slopes is not None:
        sign = -1.0 if is_wrong("ALiBi sign") else 1.0
        distance = j - i if is_wrong("ALiBi not aligned") else j - center
        scores = scores - sign * slopes.reshape(-1, case.H, 1, 1) * distance.abs()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(mask if is_wrong("mask inverted") else ~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.float() * (scale if is_wrong("mask scaled too") else 1.0)
    scores = cap(scores) if is_wrong("softcap after the mask") else scores
    left, right = case.window or (-1, -1)
    left = left + 1 if is_wrong("window off by one") else left
    right = 0 if case.causal else right
    right = right - 1 if is_wrong("causal excludes the diagonal") else right + is_wrong("causal sees one more")
    seen = torch.ones(rows, keys, dtype=torch.bool)
    seen &= (j >= center - left) if left >= 0 else True
    seen &= (j <= center + right) if case.causal or right >= 0 else True
    if is_wrong("one key missing"):
        seen[:, -1] = False
    scores = scores.masked_fill(~seen, -torch.inf)
    columns = keys
    if sinks is not None:
        sink = sinks.reshape(1, case.H, 1, 1).expand(case.B, case.H, rows, 1)
        scores = torch.cat((scores, sink), -1)
        columns = keys + is_wrong("sink in the numerator")
    weights, lse = cases._softmax(scores, columns)
    if is_wrong("lse without the sink"):
        lse = cases._softmax(scores[..., :keys], keys)[1]
    if columns > keys:
        v = torch.cat((v, v.mean(2, keepdim=True)), 2)
    if case.dropout:
        torch.manual_seed(cases.SEED)
        seed = _random.draw_seed(q.device)
        head = torch.arange(case.B * case.H).view(case.B, case.H, 1, 1)
        numbers = head + case.B * case.H * i if is_wrong("dropout of other rows") else head * rows + i
        keep = _random.keep(seed, numbers, j, case.dropout)
        weights = torch.where(keep, weights if is_wrong("dropout without rescale") else weights / (1 - case.dropout), 0)
    return (weights @ v).to(inputs.q.dtype), lse


BASE = cases.AttentionCase(SDPA, B=1, H=4, Hk=2, S=24, T=40, D=16)
CAUSAL = replace(BASE, causal="bottom_right")
ALL_OF_THEM = ("out", "dq", "dk", "dv")
WRONG = {
    "one key missing": (replace(BASE, T=130), ALL_OF_THEM),
    "scale 1 % off": (BASE, ALL_OF_THEM),
    "causal excludes the diagonal": (CAUSAL, ALL_OF_THEM),
    "causal sees one more": (CAUSAL, ALL_OF_THEM),
    "alignment swapped": (CAUSAL, ALL_OF_THEM),
    "heads interleaved": (BASE, ALL_OF_THEM),
    "softcap after the mask": (replace(BASE, softcap=5.0, mask="additive"), (*ALL_OF_THEM, "dmask")),
    "ALiBi sign": (replace(BASE, alibi=True), ALL_OF_THEM),
    "ALiBi not aligned": (replace(BASE, alibi=True), ALL_OF_THEM),
    "mask inverted": (replace(BASE, mask="bool"), ALL_OF_THEM),
    "mask scaled too": (replace(BASE, mask="additive"), (*ALL_OF_THEM, "dmask")),
    "window off by one": (replace(BASE, window=(5, 3)), ALL_OF_THEM),
    "dropout without rescale": (replace(BASE, dropout=0.3), ALL_OF_THEM),
    "dropout of other rows": (replace(BASE, dropout=0.3), ALL_OF_THEM),
    "sink in the numerator": (replace(BASE, sinks=True), ("out", "dq", "dv", "dsinks")),
    "lse without the sink": (replace(BASE, sinks=True), ("lse", "dq", "dsinks")),
}
# bf16 rounds each weight by up to 0.4 %, and a column of dv is a sum of few of them.
TOO_SMALL_IN_BF16 = {"scale 1 % off": {"dv"}}


def caught(case, inputs, results):
    return {name for name, found in judge_results(cases, case, inputs, results).items() if found.message}


@both_dtypes
@pytest.mark.parametrize("wrong", WRONG)
def test_rule_rejects_wrong_variants(dtype, wrong):
    case, names = WRONG[wrong]
    case = replace(case, dtype=dtype)
    inputs = cases.make_inputs(case)
    right, bad = (
        outputs_and_gradients(inputs, lambda leaves, mistakes=mistakes: variant(case, leaves, *mistakes))
        for mistakes in ((), (wrong,))
    )
    assert caught(case, inputs, right) == set()
    excused = TOO_SMALL_IN_BF16.get(wrong, set()) if dtype == torch.bfloat16 else set()
    assert set(names) - excused <= caught(case, inputs, bad)


def gradients(case, inputs, *wrong):
    """The backward of reference.py's maths in fp32 for k and v with as many heads as q, with mistakes."""
    is_wrong = lambda word: word in wrong
    q, k, v, dout, dlse = (x.float() for x in (inputs.q, inputs.k, inputs.v, inputs.dout, inputs.dlse))
    group, scale = case.H // case.key_heads, 1.0 / math.sqrt(case.D)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    capped = case.softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / case.softcap)
    scores, sinks = capped + inputs.mask.float(), inputs.sinks.float().reshape(1, -1, 1, 1)
    lse = torch.logsumexp(torch.cat((scores, sinks.expand(*scores.shape[:3], 1)), -1), -1, keepdim=True)
    weights, sink_weights = torch.exp(scores - lse), torch.exp(sinks - lse)
    torch.manual_seed(cases.SEED)
    seed = _random.draw_seed(q.device)
    numbers = torch.arange(case.B * case.H * case.S).view(case.B, case.H, case.S, 1)
    keep = _random.keep(seed, numbers, torch.arange(case.T), case.dropout) / (1.0 - case.dropout)
    dweights = dout @ v.transpose(-1, -2) * (1.0 if is_wrong("dropout not replayed in ds") else keep)
    rescale = 1.0 - case.dropout if is_wrong("delta before the rescale") else 1.0
    delta = (weights * dweights * rescale).sum(-1, keepdim=True)
    delta = delta if is_wrong("dlse forgotten") else delta - dlse[..., None]
    ds = weights * (dweights if is_wrong("delta forgotten") else dweights - delta)
    dmask = ds
    if not is_wrong("derivative of softcap forgotten"):
        ds = ds * (1.0 - (capped / case.softcap) ** 2)
    ds = ds if is_wrong("scale forgotten in ds") else ds * scale
    summed = lambda x: x.unflatten(1, (case.key_heads, group))
    summed_heads = lambda x: summed(x)[:, :, 0] if is_wrong("one head of a group in dk") else summed(x).sum(2)
    if is_wrong("mask after the softcap's derivative"):
        dmask = ds / scale
    kept = weights if is_wrong("dropout not replayed in dv") else weights * keep
    return {
        "dq": ds @ k,
        "dk": summed_heads(ds.transpose(-1, -2) @ q),
        "dv": summed(kept.transpose(-1, -2) @ dout).sum(2),
        "dmask": dmask.sum_to_size(inputs.mask.shape) * (0.5 if is_wrong("half of the batch in dmask") else 1.0),
        "dsinks": (sink_weights * delta).sum((0, 2, 3)) * (1.0 if is_wrong("sign of dsinks") else -1.0),
    }


GRADIENT_CASE = cases.AttentionCase(
    SDPA, B=2, H=4, Hk=2, S=24, T=40, D=16, softcap=3.0, mask="additive", mask_shape="HST", sinks=True, dropout=0.25
)
WRONG_GRADIENTS = {
    "delta forgotten": ("dq", "dk", "dmask"),
    "delta before the rescale": ("dq", "dk", "dmask", "dsinks"),
    "dlse forgotten": ("dq", "dk", "dmask", "dsinks"),
    "dropout not replayed in ds": ("dq", "dk", "dmask", "dsinks"),
    "dropout not replayed in dv": ("dv",),
    "derivative of softcap forgotten": ("dq", "dk"),
    "mask after the softcap's derivative": ("dmask",),
    "scale forgotten in ds": ("dq", "dk"),
    "one head of a group in dk": ("dk",),
    "half of the batch in dmask": ("dmask",),
    "sign of dsinks": ("dsinks",),
}


@both_dtypes
@pytest.mark.parametrize("wrong", WRONG_GRADIENTS)
def test_rule_rejects_wrong_gradients(dtype, wrong):
    case = replace(GRADIENT_CASE, dtype=dtype)
    inputs = cases.make_inputs(case)
    results = outputs_and_gradients(inputs, lambda leaves: cases.call(case, leaves, "torch"))
    in_dtype = lambda found: {name: value.to(results[name].dtype) for name, value in found.items()}
    assert caught(case, inputs, results | in_dtype(gradients(case, inputs))) == set()
    assert set(WRONG_GRADIENTS[wrong]) <= caught(case, inputs, results | in_dtype(gradients(case, inputs, wrong)))
