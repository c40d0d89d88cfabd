"""The launchers of attention_fwd and attention_bwd in Triton: sizes of blocks, layouts, grids."""

import torch
import triton
from torch import Tensor

from llmkernels import _random
from llmkernels._triton import described
from llmkernels.ops.attention.reference import empty_out
from llmkernels.ops.attention.triton_bwd import _attention_delta_kernel, _attention_dq_kernel
from llmkernels.ops.attention.triton_dkv import _attention_dkv_kernel
from llmkernels.ops.attention.triton_dmask import _attention_dmask_kernel
from llmkernels.ops.attention.triton_fwd import _attention_fwd_kernel

DELTA_ROWS = 16

# (BLOCK_M, BLOCK_N, warps, stages) by the itemsize and the larger head dimension, padded to a power of two: as large as
# registers and shared memory of every architecture allow without spilling. A product in fp32 runs on no tensor core.
_TILES = {
    ("fwd", 2): {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2), 512: (32, 32, 8, 1)},
    ("fwd", 4): {64: (64, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1), 512: (16, 16, 8, 1)},
    ("dq", 2): {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2), 512: (32, 32, 8, 1)},
    ("dq", 4): {64: (64, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1), 512: (16, 16, 8, 1)},
    ("dkv", 2): {64: (64, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2), 512: (16, 16, 8, 1)},
    ("dkv", 4): {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1), 512: (16, 16, 8, 1)},
    ("dmask", 2): {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2), 512: (16, 16, 8, 1)},
    ("dmask", 4): {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1), 512: (16, 16, 8, 1)},
}
# Where a mask, dropout, a softcap or ALiBi needs more registers.
_TILES_WITH_OPTIONS = {
    ("fwd", 2): {128: (128, 32, 8, 2)},
    ("fwd", 4): {64: (32, 32, 8, 1)},
    ("dq", 2): {64: (128, 32, 8, 2), 512: (32, 16, 8, 1)},
    ("dq", 4): {64: (32, 32, 8, 1)},
    ("dkv", 2): {64: (32, 64, 8, 1), 128: (32, 64, 8, 1), 256: (32, 32, 8, 1)},
    ("dkv", 4): {64: (16, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
}


def padded(dim: int) -> int:
    """What a tile has for a head dimension: 16 at least, which a product needs."""
    return max(triton.next_power_of_2(dim), 16)


def tiles(kernel: str, dim: int, itemsize: int, options: bool) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, stages) of a kernel for padded head dimensions of up to `dim`."""
    dim = max(dim, 64)
    plain = _TILES[kernel, itemsize][dim]
    return _TILES_WITH_OPTIONS.get((kernel, itemsize), {}).get(dim, plain) if options else plain


def rows(tensor: Tensor) -> Tensor:
    """`tensor` with a contiguous last dimension."""
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] <= 1 else tensor.contiguous()


def strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_{what}": tensor.stride(i) for i, what in enumerate(("batch", "head", "row"))}


def open_window(left: int, right: int, longest: int) -> dict:
    """Windows that reach beyond everything are none."""
    left, right = (-1 if entry >= longest else entry for entry in (left, right))
    return {"window_left": left, "window_right": right, "LEFT": left >= 0, "RIGHT": right >= 0}


def numbers(scale: float, softcap: float) -> dict:
    inverse = 1.0 / softcap if softcap > 0.0 else 0.0
    return {"scale": scale, "softcap": softcap, "softcap_inverse": inverse, "SOFTCAP": softcap > 0.0}


def slopes_of(alibi_slopes: Tensor | None) -> dict:
    if alibi_slopes is None:
        return {"slopes_ptr": None, "slope_batch": 0}
    slopes = alibi_slopes.contiguous()
    return {"slopes_ptr": slopes, "slope_batch": slopes.stride(0) if slopes.dim() == 2 else 0}


def head_dims(k: Tensor, v: Tensor) -> dict:
    dim, value_dim = k.shape[3], v.shape[3]
    return {"D": dim, "DV": value_dim, "D_PAD": padded(dim), "DV_PAD": padded(value_dim)}


class _Call:
    """The tensors and numbers of a call that all kernels share, as their keyword arguments."""

    def __init__(self, q, k, v, mask, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                 scale, window_left, window_right, top_left, softcap, dropout_p):  # fmt: skip
        self.q, self.k, self.v = q, k, v = rows(q), rows(k), rows(v)
        self.dtype, self.heads, self.key_heads = q.dtype, q.shape[1], k.shape[1]
        q_rows, k_rows = q.shape[2], k.shape[2]
        self.packed = cu_seqlens_q is not None
        self.batch = cu_seqlens_q.shape[0] - 1 if self.packed else q.shape[0]
        self.longest_q = min(max_seqlen_q, q_rows) if self.packed else q_rows
        self.longest_k = min(max_seqlen_k, k_rows) if self.packed else k_rows
        self.dims = head_dims(k, v)
        self.pad = max(self.dims["D_PAD"], self.dims["DV_PAD"])
        self.options = mask is not None or alibi_slopes is not None or seed is not None or softcap > 0.0
        self.arguments = {
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "seed_ptr": seed,
            **self.strides("q", q), **self.strides("k", k), **self.strides("v", v), **self.read_mask(mask),
            **slopes_of(alibi_slopes), **open_window(window_left, window_right, q_rows + k_rows),
            **numbers(scale, softcap), **self.dims, "TOP_LEFT": top_left,
            "heads": self.heads, "group": self.heads // max(self.key_heads, 1), "q_rows": q_rows, "k_rows": k_rows,
            "threshold": _random.threshold(dropout_p), "keep_inverse": 1.0 / max(1.0 - dropout_p, 1e-30),
        }  # fmt: skip
        self.ends = {"ends_q_ptr": cu_seqlens_q, "ends_k_ptr": cu_seqlens_k}
        if self.packed:
            self.ends = {name: ends.contiguous() for name, ends in self.ends.items()}

    def strides(self, name: str, tensor: Tensor) -> dict[str, int]:
        """Of a packed batch the sequences are rows."""
        return strides(name, tensor) | ({f"{name}_batch": 0} if self.packed else {})

    def read_mask(self, mask: Tensor | None) -> dict:
        """As `mask`, with a column stride that the kernels are compiled for."""
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        found = self.mask(None if mask is None else rows(mask))
        return {("MASK_COL" if name == "mask_col" else name): value for name, value in found.items()}

    def mask(self, mask: Tensor | None, name: str = "mask") -> dict:
        """Its pointer and its strides, 0 where it is broadcast."""
        found = dict.fromkeys((f"{name}_{what}" for what in ("batch", "head", "row", "col")), 0)
        if mask is not None:
            sizes, steps = mask.shape, mask.stride()
            found = {key: step if size > 1 else 0 for key, size, step in zip(found, sizes, steps, strict=True)}
        return {f"{name}_ptr": mask, **found}

    def descriptors(self, rows: int, **tensors: Tensor) -> dict:
        """Of the tensors that come by in blocks of `rows`, where a descriptor pays: 16-bit types, which a product reads
        from shared memory. Of a packed batch it would read on into the next sequence, and with more columns registers
        are spilled."""
        pays = self.dtype.itemsize == 2 and not self.packed and self.pad <= 128
        columns = lambda name: self.dims["D_PAD" if name in "qk" else "DV_PAD"]
        return {f"{name}_desc": described(x, rows, columns(name)) if pays else None for name, x in tensors.items()}

    def tiles(self, kernel: str) -> tuple[int, int, dict]:
        """(BLOCK_M, BLOCK_N, the same and how to launch as keyword arguments)."""
        block_m, block_n, warps, stages = tiles(kernel, self.pad, self.dtype.itemsize, self.options)
        return block_m, block_n, {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages, "num_warps": warps}


def attention_fwd(q, k, v, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, *options):
    out = empty_out(q, v)
    row_max, log_sum = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    tensors = (q, k, v, mask, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k)
    call = _Call(*tensors, max_seqlen_q, k.shape[2], *options)
    block_m, block_n, launch = call.tiles("fwd")
    blocks = triton.cdiv(call.longest_q, block_m)
    programs = blocks * call.heads * call.batch
    if programs > 0:
        with torch.cuda.device_of(q):
            _attention_fwd_kernel[(programs,)](
                **call.arguments, **call.ends, **call.descriptors(block_n, k=call.k, v=call.v),
                **call.strides("out", out),
                sinks_ptr=None if sinks is None else sinks.contiguous(),
                out_ptr=out, row_max_ptr=row_max, log_sum_ptr=log_sum, q_blocks=blocks, **launch,
            )  # fmt: skip
    return out, row_max, log_sum


def _grad(want: bool, of: Tensor) -> tuple[Tensor, Tensor | None]:
    """(what is returned: with the layout of the tensor, what the kernels write: with a contiguous last dimension)."""
    if not want:
        return of.new_empty(0), None
    grad = torch.empty_like(of)
    same = grad.dim() != 4 or grad.stride(3) == 1 or grad.shape[3] <= 1
    return grad, grad if same else torch.empty_like(grad, memory_format=torch.contiguous_format)


def _delta(call: _Call, dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """[B, H, S] fp32: dout . out - dlse."""
    delta = dout.new_empty(dout.shape[:3], dtype=torch.float32)
    batch, heads, count, dim = dout.shape
    blocks = triton.cdiv(count, DELTA_ROWS)
    if blocks * heads * batch > 0:
        _attention_delta_kernel[(blocks * heads * batch,)](
            dout_ptr=dout, out_ptr=out, dlse_ptr=dlse, delta_ptr=delta,
            **strides("dout", dout), **strides("out", out),
            q_blocks=blocks, heads=heads, rows_of_head=count, DV=dim, DV_PAD=call.dims["DV_PAD"], BLOCK_M=DELTA_ROWS,
            num_warps=4,
        )  # fmt: skip
    return delta


def _delta_of_weights(call: _Call, shared: dict, dlse: Tensor | None) -> Tensor:
    """[B, H, S] fp32: sum_j p dp - dlse, which is delta without the rounding of out.

    The gradient of a mask in fp32 shows it: where one key has most of a row's weight, p * (dp - delta) is a small
    difference. The sums over all keys of a mask's gradient are sum_j p dp where delta is 0.
    """
    sums = torch.empty_like(shared["row_max_ptr"])
    _dmask(call, {**shared, "delta_ptr": torch.zeros_like(sums)}, sums[..., None])
    return sums if dlse is None else sums - dlse


def _dmask(call: _Call, shared: dict, dmask: Tensor) -> None:
    block_m, block_n, launch = call.tiles("dmask")
    batch, heads, count, keys = dmask.shape
    sum_rows, sum_cols = count == 1, keys == 1  # of one query or key the sum is that query's or key's
    row_tiles, col_tiles = triton.cdiv(count, block_m), triton.cdiv(keys, block_n)
    programs = batch * heads * row_tiles * col_tiles
    if programs > 0:
        _attention_dmask_kernel[(programs,)](
            **shared, **call.mask(dmask, "dmask"), row_tiles=row_tiles, col_tiles=col_tiles, head_tiles=heads,
            sum_batches=call.batch if batch == 1 else 1, sum_heads=call.heads if heads == 1 else 1,
            SUM_ROWS=sum_rows, SUM_COLS=sum_cols, **launch,
        )  # fmt: skip


def _dsinks(sinks: Tensor, row_max: Tensor, log_sum: Tensor, delta: Tensor) -> Tensor:
    """-sum over the batch and the queries of the weight of the sink times delta."""
    top = torch.where(row_max == -torch.inf, 0.0, row_max)
    weights = torch.exp((sinks.float()[:, None] - top) - log_sum)
    return (weights * delta).sum((0, 2)).neg().to(sinks.dtype)


def attention_bwd(dout, dlse, q, k, v, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                  max_seqlen_k, out, row_max, log_sum, *rest):  # fmt: skip
    *options, wanted = rest
    tensors = (q, k, v, mask, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k)
    call = _Call(*tensors, max_seqlen_q, max_seqlen_k, *options)
    dout, out = rows(dout), rows(out)
    row_max, log_sum = row_max.contiguous(), log_sum.contiguous()
    grads = [_grad(want, of) for want, of in zip(wanted[:3], (q, k, v), strict=True)]
    (_, to_q), (_, to_k), (_, to_v) = grads
    dmask, _ = _grad(wanted[3], mask if wanted[3] else q)
    dlse = None if dlse is None else dlse.contiguous()
    shared = {
        **call.arguments, "dout_ptr": dout, **call.strides("dout", dout),
        "row_max_ptr": row_max, "log_sum_ptr": log_sum,
    }  # fmt: skip
    with torch.cuda.device_of(q):
        if wanted[3] and mask.dtype.itemsize > q.dtype.itemsize:
            delta = _delta_of_weights(call, shared, dlse)
        else:
            delta = _delta(call, dout, out, dlse)
        shared["delta_ptr"] = delta
        if to_q is not None:
            block_m, block_n, launch = call.tiles("dq")
            blocks = triton.cdiv(call.longest_q, block_m)
            if blocks * call.heads * call.batch > 0:
                _attention_dq_kernel[(blocks * call.heads * call.batch,)](
                    **shared, **call.ends, **call.descriptors(block_n, k=call.k, v=call.v),
                    dq_ptr=to_q, **call.strides("dq", to_q), blocks=blocks, **launch,
                )  # fmt: skip
        if to_k is not None or to_v is not None:
            block_m, block_n, launch = call.tiles("dkv")
            blocks = triton.cdiv(call.longest_k, block_n)
            if blocks * call.key_heads * call.batch > 0:
                _attention_dkv_kernel[(blocks * call.key_heads * call.batch,)](
                    **shared, **call.ends, **call.descriptors(block_m, q=call.q, dout=dout),
                    dk_ptr=to_k, dv_ptr=to_v,
                    **call.strides("dk", k if to_k is None else to_k),
                    **call.strides("dv", v if to_v is None else to_v),
                    blocks=blocks, **launch,
                )  # fmt: skip
        if wanted[3]:
            _dmask(call, shared, dmask)
    dsinks = _dsinks(sinks, row_max, log_sum, delta) if wanted[4] else q.new_empty(0)
    for grad, written in grads:
        if written is not None and written is not grad:
            grad.copy_(written)
    return (*(grad for grad, _ in grads), dmask, dsinks)
