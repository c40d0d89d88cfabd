"""flash-attn's ways to say where the rows of a sequence are, as the pages and packed rows that our functions take."""

import torch
from torch import Tensor

from llmkernels.ops.attention import arguments, rotary


def expect(op: str, name: str, tensor: Tensor, shape: str, packed_at: int | None = None, packed: int = 1) -> None:
    """`shape` in words; `packed` is the size of dimension `packed_at`."""
    sizes = shape.strip("()").split(", ")
    if tensor.dim() != len(sizes) or (packed_at is not None and tensor.shape[packed_at] != packed):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def gathered(op, q, k, v, cu_seqlens_k, max_seqlen_k, block_table) -> tuple[Tensor, Tensor]:
    """The keys and values of paged sequences, packed."""
    for name, tensor in (("k", k), ("v", v)):
        expect(op, name, tensor, "(pages, page_size, nheads, headdim)")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"{op}: v has shape {tuple(v.shape)}, expected {tuple(k.shape[:2])} pages and rows, those of k"
        )
    arguments.check_tensor(op, "block_table", block_table, q, torch.int32)
    total = int(cu_seqlens_k[-1])
    arguments.cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, q, total, max_seqlen_k, "max_seqlen_k")
    sequences, page_size = cu_seqlens_k.shape[0] - 1, k.shape[1]
    if block_table.dim() != 2 or block_table.shape[0] != sequences:
        raise ValueError(
            f"{op}: block_table has shape {tuple(block_table.shape)}, expected ({sequences}, pages of a sequence)"
        )
    lengths = cu_seqlens_k.diff()
    room, checked = block_table.shape[1] * page_size, arguments.values_are_checked(block_table)
    if checked and sequences and int(lengths.max()) > room:
        raise ValueError(f"{op}: a sequence has {int(lengths.max())} keys, expected no more than {room}, its pages")
    sequence = torch.repeat_interleave(torch.arange(sequences, device=q.device), lengths, output_size=total)
    row = torch.arange(total, device=q.device) - cu_seqlens_k[sequence]
    page = block_table[sequence, row // page_size].long()
    if checked and total and not (int(page.min()) >= 0 and int(page.max()) < k.shape[0]):
        raise ValueError(
            f"{op}: block_table has pages from {int(page.min())} to {int(page.max())}, expected 0 to {k.shape[0] - 1}"
        )
    return k[page, row % page_size], v[page, row % page_size]


def check_rows(op: str, name: str, rows: Tensor, q: Tensor, last: int) -> None:
    """int32 `[B]` of values from 0 to `last`."""
    arguments.check_tensor(op, name, rows, q, torch.int32)
    if tuple(rows.shape) != (q.shape[0],):
        raise ValueError(f"{op}: {name} has shape {tuple(rows.shape)}, expected ({q.shape[0]},)")
    if arguments.values_are_checked(rows):
        for b, row in enumerate(rows.tolist()):
            if not 0 <= row <= last:
                raise ValueError(f"{op}: {name}[{b}] is {row}, expected 0 to {last}")


def shifted(op, q, k, k_cache, v_cache, turning, cache_seqlens, cache_batch_idx, cache_leftpad, options):
    """(q, k, k_cache, v_cache, cache_seqlens, block_table) of the same call without a left padding: pages of one row.

    q and k are turned here, since their positions are the rows of the cache and not those of the pages.
    """
    (batch, room), device = k_cache.shape[:2], q.device
    check_rows(op, "cache_leftpad", cache_leftpad, q, room)
    rows = torch.arange(room, dtype=torch.int32, device=device) + cache_leftpad[:, None]
    if cache_batch_idx is not None:
        check_rows(op, "cache_batch_idx", cache_batch_idx, q, batch - 1)
        first = cache_batch_idx[:, None] * room
    else:
        first = torch.arange(q.shape[0], dtype=torch.int32, device=device)[:, None] * room
    block_table = torch.where(rows < room, first + rows, -1)  # not into the next sequence
    paged = []
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape[:2] != (batch, room) or (cache.numel() and cache.stride(0) != room * cache.stride(1)):
            raise ValueError(
                f"{op}: {name} has shape {tuple(cache.shape)} and strides {cache.stride()}, expected"
                f" ({batch}, {room}) in one piece, for cache_leftpad"
            )
        paged.append(cache.view(batch * room, 1, *cache.shape[2:]))
    if cache_seqlens is None:
        if k is not None:
            raise ValueError(f"{op}: cache_seqlens is missing, expected the lengths at which k and v are appended")
        cache_seqlens = room
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=device)
    check_rows(op, "cache_seqlens", cache_seqlens, q, room - (0 if k is None else k.shape[1]))
    lengths = cache_seqlens.tolist() if arguments.values_are_checked(cache_seqlens) else None
    if lengths is not None:
        for b, (length, padding) in enumerate(zip(lengths, cache_leftpad.tolist(), strict=True)):
            if padding > length:
                raise ValueError(f"{op}: cache_leftpad[{b}] is {padding}, expected no more than {length}, its length")
    if turning is not None:
        turned = q.shape[1] if options["causal"] or options["window"] != (-1, -1) else 1
        rotary.check(op, turning, q, k, turned, lengths)
        q, k = rotary.turn(q, k, turning, cache_seqlens, turned)
    return q, k, *paged, cache_seqlens - cache_leftpad, block_table
