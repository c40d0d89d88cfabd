"""What is worth timing of attention, and the peers to beat."""

from dataclasses import replace

import torch
import torch.nn.functional as torch_functional

from llmkernels.ops.attention import cases
from llmkernels.ops.attention.cases import AttentionCase
from llmkernels.ops.attention.forward_cases import CacheCase


def bench_cases(op: str, full: bool) -> list[AttentionCase]:
    """Cases of `op`: the goals' shapes, and with `full` what each option costs beside the plain call of its size."""
    if op == "attention_kvcache":
        lengths = [(4096,), (1024,) * 8] if full else [(4096,)]
        cases = [(rows, 8) for rows in lengths] + [((4096,), 1)]
        return [_decoding(dtype, *case) for dtype in (torch.float32, torch.bfloat16) for case in cases]
    make = lambda dtype, **sizes: AttentionCase(op, dtype=dtype, lse=False, **{"T": sizes["S"], **sizes})
    if op == "attention_varlen":
        lengths = (512, 256, 128, 64, 64)
        return [AttentionCase(op, B=5, H=8, D=64, dtype=dtype, causal="bottom_right", lengths=(lengths, lengths),
                              lse=False)
                for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip
    found = [make(dtype, B=1, H=8, S=1024, D=64, causal=causal) for dtype in (torch.bfloat16, torch.float32)
             for causal in ("top_left", None)]  # fmt: skip
    found += [make(dtype, B=4, H=8, S=512, D=64, causal="top_left") for dtype in (torch.bfloat16, torch.float32)]
    if full:
        found.append(make(torch.bfloat16, B=1, H=8, S=2048, D=128, causal="top_left"))
        options = ({}, {"window": (64, 64)}, {"mask": "bool"}, {"mask": "bool", "mask_shape": "BT"},
                   {"mask": "additive", "mask_shape": "HST"}, {"dropout": 0.1}, {"softcap": 20.0}, {"alibi": True},
                   {"sinks": True})  # fmt: skip
        found += [make(dtype, B=2, H=4, S=1024, D=64, **option) for dtype in (torch.bfloat16, torch.float32)
                  for option in options]  # fmt: skip
        found += [make(dtype, B=1, H=32, Hk=8, S=1, T=4096, D=128) for dtype in (torch.bfloat16, torch.float32)]
    return found


def _decoding(dtype: torch.dtype, lengths: tuple[int, ...], key_heads: int) -> CacheCase:
    """One token of a model with 32 heads, which share the keys of 8 or of a single one."""
    sizes = {"H": 32, "Hk": key_heads, "D": 128, "Dv": 128, "T": max(lengths)}
    return CacheCase("decode", lengths, dtype=dtype, lse=False, **sizes)


def small(case: AttentionCase | CacheCase, elements: int) -> AttentionCase | CacheCase:
    """A case of `bench_cases` with about so many elements in each tensor, for what is counted and not timed."""
    if isinstance(case, CacheCase):
        length = max(1, min(case.T, elements // case.D))
        return replace(case, lengths=(length,), T=length, H=case.H // case.Hk, Hk=1)
    heads = case.H // case.key_heads
    if case.lengths is not None:
        return replace(case, B=2, H=heads, Hk=1, lengths=((100, 30), (100, 130)))
    length = max(1, elements // case.D)
    return replace(case, B=1, H=heads, Hk=1, S=min(case.S, length), T=min(case.T, length))


def without_chance(case: AttentionCase | CacheCase) -> AttentionCase | CacheCase:
    """`case` as a peer is checked on: torch's dropout drops other elements."""
    return case if isinstance(case, CacheCase) else replace(case, dropout=0.0)


def overhead_case(op: str) -> AttentionCase | CacheCase:
    """One query: the time is that of the call, not of the kernel."""
    if op == "attention_kvcache":
        return CacheCase("call", (8,), H=1, Hk=1, D=64, Dv=64, T=8, lse=False)
    lengths = ((8,), (8,)) if op == "attention_varlen" else None
    return AttentionCase(op, B=1, H=1, S=1, T=8, D=64, lengths=lengths, lse=False)


def _band(case: AttentionCase, device) -> torch.Tensor | None:
    """The window as the boolean mask that a torch user makes of it."""
    if case.window is None:
        return None
    distance = torch.arange(case.T, device=device) - torch.arange(case.S, device=device)[:, None] - (case.T - case.S)
    return (distance >= -case.window[0]) & (distance <= case.window[1])


def _sdpa(case: AttentionCase, inputs, band: torch.Tensor | None):
    """torch's fused attention, for the cases that it has; it returns no lse."""
    mask = inputs.boolean_mask if inputs.mask is None else inputs.mask
    return (
        torch_functional.scaled_dot_product_attention(
            inputs.q, inputs.k, inputs.v, band if mask is None else mask, case.dropout,
            is_causal=case.causal == "top_left", enable_gqa=case.key_heads != case.H,
        ),
    )  # fmt: skip


def _padded(case: AttentionCase, inputs):
    """attention_varlen as torch users write it: pad, and mask what was padded."""
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(x, ends.long()).to_padded_tensor(0.0).transpose(1, 2)
        for x, ends in zip((inputs.q, inputs.k, inputs.v), (*inputs.cu_seqlens, inputs.cu_seqlens[1]), strict=True)
    )
    lengths = [ends.diff() for ends in inputs.cu_seqlens]
    seen = torch.arange(k.shape[2], device=k.device) < lengths[1][:, None]
    mask = seen[:, None, None, :].expand(-1, 1, q.shape[2], -1)
    mask = mask.tril() if case.causal else mask  # of sequences with as many queries as keys
    out = torch_functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=case.key_heads != case.H)
    kept = torch.arange(q.shape[2], device=q.device) < lengths[0][:, None]
    return (out.transpose(1, 2)[kept],)


def _one_by_one(case: AttentionCase, inputs):
    """attention_varlen as a loop over the sequences, each of which has as many queries as keys."""
    rows, _ = case.lengths
    parts = zip(*(x.transpose(0, 1).split(rows, 1) for x in (inputs.q, inputs.k, inputs.v)), strict=True)
    options = {"is_causal": case.causal is not None, "enable_gqa": case.key_heads != case.H}
    outs = [torch_functional.scaled_dot_product_attention(*(x[None] for x in part), **options) for part in parts]
    return (torch.cat(outs, 2)[0].transpose(0, 1),)


def _decoded(case: CacheCase, inputs, *, grouped: bool):
    """torch's fused attention to caches [B, Hk, T, D]; `grouped`: the heads that share keys as rows of one head."""
    q, (k, v) = inputs.q.transpose(1, 2), inputs.heads_first
    if grouped:
        q = q.unflatten(1, (case.Hk, case.H // case.Hk)).flatten(2, 3)
    out = torch_functional.scaled_dot_product_attention(q, k, v, enable_gqa=not grouped)
    return (out.unflatten(2, (-1, case.S)).flatten(1, 2).transpose(1, 2) if grouped else out.transpose(1, 2),)


def peers(case: AttentionCase | CacheCase) -> dict:
    """Name -> function of the inputs; what is returned is compared as far as it goes."""
    if isinstance(case, CacheCase):
        return {
            "torch sdpa": lambda inputs: _decoded(case, inputs, grouped=False),
            "torch sdpa, heads as rows": lambda inputs: _decoded(case, inputs, grouped=True),
        }
    if case.lengths is not None:
        found = {"torch sdpa, padded": lambda inputs: _padded(case, inputs)}
        if case.lengths[0] == case.lengths[1]:
            found["torch sdpa, one by one"] = lambda inputs: _one_by_one(case, inputs)
        return found
    if case.softcap or case.alibi or case.sinks:
        return {"torch eager": lambda inputs: cases.call_torch(case, inputs)}
    band = _band(case, "cuda" if torch.cuda.is_available() else "cpu")
    return {"torch sdpa": lambda inputs: _sdpa(case, inputs, band)}


def forward_peers(case: AttentionCase | CacheCase, device: str) -> dict:
    """As `peers`, without a backward: none."""
    return {}
