"""lstm_cell in Triton: kernels and launchers, with the signatures of the raw ops.

A program takes BLOCK_UNITS units of one row.
"""

import torch
import triton
import triton.language as tl

from llmkernels._dtypes import accumulate_dtype
from llmkernels._triton import TL_DTYPE, cast

MAX_BLOCK = 512  # units of a program: nine values each
THREAD_UNITS = 4


def config(hidden: int) -> tuple[int, int]:
    """(BLOCK_UNITS, num_warps) for rows of `hidden` units."""
    block = min(triton.next_power_of_2(max(hidden, 32)), MAX_BLOCK)
    return block, max(block // (32 * THREAD_UNITS), 1)


@triton.jit
def _sigmoid(x, ACC: tl.constexpr):
    one = tl.full(x.shape, 1.0, ACC)
    return one / (one + tl.exp(-x))


@triton.jit
def _tanh(x, ACC: tl.constexpr):
    """sign(x) (1 - e) / (1 + e) with e = exp(-2 |x|); its series for small x, where 1 - e would lose its digits."""
    one = tl.full(x.shape, 1.0, ACC)
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (one - e) / (one + e)
    s = x * x
    if tl.float64 == ACC:
        # Up to the 13th power.
        near = size * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0
            + s * (-1382.0 / 155925.0 + s * (21844.0 / 6081075.0)))))))  # fmt: skip
        value = tl.where(size < 0.1, near, far)
    else:
        near = size * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
        value = tl.where(size < 0.25, near, far)
    return tl.where(x < 0.0, -value, value)


@triton.jit
def _place(hidden, BLOCK_UNITS: tl.constexpr):
    """(row, units, mask) of this program."""
    blocks = tl.cdiv(hidden, BLOCK_UNITS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    return row, at, at < hidden


@triton.jit
def _sum(x_ptr, h_ptr, at, mask, ACC: tl.constexpr):
    return tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC) + tl.load(h_ptr + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def _lstm_cell_fwd_kernel(
    gates_x_ptr,  # [batch, 4 * hidden] T
    gates_h_ptr,  # [batch, 4 * hidden] T
    c_ptr,  # [batch, hidden] T
    next_h_ptr,  # [batch, hidden] T
    next_c_ptr,  # [batch, hidden] T
    gates_ptr,  # [batch, 4 * hidden] T, activated; unused unless SAVE
    hidden,
    SAVE: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    ACC: tl.constexpr,
):
    row, at, mask = _place(hidden, BLOCK_UNITS)
    x_ptr, h_ptr = gates_x_ptr + row * 4 * hidden, gates_h_ptr + row * 4 * hidden
    i = _sigmoid(_sum(x_ptr, h_ptr, at, mask, ACC), ACC)
    f = _sigmoid(_sum(x_ptr, h_ptr, hidden + at, mask, ACC), ACC)
    g = _tanh(_sum(x_ptr, h_ptr, 2 * hidden + at, mask, ACC), ACC)
    o = _sigmoid(_sum(x_ptr, h_ptr, 3 * hidden + at, mask, ACC), ACC)
    c = f * tl.load(c_ptr + row * hidden + at, mask=mask, other=0.0).to(ACC) + i * g
    h = o * _tanh(c, ACC)
    kind = c_ptr.dtype.element_ty
    tl.store(next_h_ptr + row * hidden + at, cast(h, kind), mask=mask)
    tl.store(next_c_ptr + row * hidden + at, cast(c, kind), mask=mask)
    if SAVE:
        to_ptr = gates_ptr + row * 4 * hidden
        tl.store(to_ptr + at, cast(i, kind), mask=mask)
        tl.store(to_ptr + hidden + at, cast(f, kind), mask=mask)
        tl.store(to_ptr + 2 * hidden + at, cast(g, kind), mask=mask)
        tl.store(to_ptr + 3 * hidden + at, cast(o, kind), mask=mask)


@triton.jit
def _lstm_cell_bwd_kernel(
    dh_ptr,  # [batch, hidden] T; unused unless DH
    dc_ptr,  # [batch, hidden] T; unused unless DC
    gates_ptr,  # [batch, 4 * hidden] T, activated
    c_ptr,  # [batch, hidden] T
    next_c_ptr,  # [batch, hidden] T
    dgates_ptr,  # [batch, 4 * hidden] T
    dlast_c_ptr,  # [batch, hidden] T
    hidden,
    DH: tl.constexpr,
    DC: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    ACC: tl.constexpr,
):
    row, at, mask = _place(hidden, BLOCK_UNITS)
    from_ptr, to_ptr, units = gates_ptr + row * 4 * hidden, dgates_ptr + row * 4 * hidden, row * hidden + at
    i = tl.load(from_ptr + at, mask=mask, other=0.0).to(ACC)
    f = tl.load(from_ptr + hidden + at, mask=mask, other=0.0).to(ACC)
    g = tl.load(from_ptr + 2 * hidden + at, mask=mask, other=0.0).to(ACC)
    o = tl.load(from_ptr + 3 * hidden + at, mask=mask, other=0.0).to(ACC)
    c = tl.load(c_ptr + units, mask=mask, other=0.0).to(ACC)
    t = _tanh(tl.load(next_c_ptr + units, mask=mask, other=0.0).to(ACC), ACC)
    dh = tl.zeros((BLOCK_UNITS,), ACC)
    if DH:
        dh = tl.load(dh_ptr + units, mask=mask, other=0.0).to(ACC)
    dc = dh * o * (1.0 - t * t)
    if DC:
        dc += tl.load(dc_ptr + units, mask=mask, other=0.0).to(ACC)
    kind = c_ptr.dtype.element_ty
    tl.store(to_ptr + at, cast(dc * g * (i * (1.0 - i)), kind), mask=mask)
    tl.store(to_ptr + hidden + at, cast(dc * c * (f * (1.0 - f)), kind), mask=mask)
    tl.store(to_ptr + 2 * hidden + at, cast(dc * i * (1.0 - g * g), kind), mask=mask)
    tl.store(to_ptr + 3 * hidden + at, cast(dh * t * (o * (1.0 - o)), kind), mask=mask)
    tl.store(dlast_c_ptr + units, cast(dc * f, kind), mask=mask)


def lstm_cell_fwd(gates_x, gates_h, c, save):
    gates_x, gates_h, c = (tensor.contiguous() for tensor in (gates_x, gates_h, c))
    next_h, next_c = torch.empty_like(c), torch.empty_like(c)
    gates = torch.empty(gates_x.shape if save else 0, dtype=c.dtype, device=c.device)
    batch, hidden = c.shape
    if c.numel():
        block, warps = config(hidden)
        with torch.cuda.device_of(c):
            _lstm_cell_fwd_kernel[(batch * triton.cdiv(hidden, block),)](
                gates_x, gates_h, c, next_h, next_c, gates, hidden,
                SAVE=save, BLOCK_UNITS=block, ACC=TL_DTYPE[accumulate_dtype(c.dtype)], num_warps=warps,
            )  # fmt: skip
    return next_h, next_c, gates


def lstm_cell_bwd(dh, dc, gates, c, next_c):
    given = (dh is not None, dc is not None)
    dh, dc, gates, c, next_c = (None if t is None else t.contiguous() for t in (dh, dc, gates, c, next_c))
    dgates, dlast_c = torch.empty_like(gates), torch.empty_like(c)
    batch, hidden = c.shape
    if c.numel():
        block, warps = config(hidden)
        with torch.cuda.device_of(c):
            _lstm_cell_bwd_kernel[(batch * triton.cdiv(hidden, block),)](
                c if dh is None else dh, c if dc is None else dc, gates, c, next_c, dgates, dlast_c, hidden,
                DH=given[0], DC=given[1], BLOCK_UNITS=block, ACC=TL_DTYPE[accumulate_dtype(c.dtype)], num_warps=warps,
            )  # fmt: skip
    return dgates, dlast_c


def configurations():
    """For testing/triton_aot.py: every block size, and every dtype at least once."""
    dtypes = ("bf16", "fp16", "fp32", "fp64")
    for index, hidden in enumerate((32, 64, 128, 256, 512, 513)):
        block, warps = config(hidden)
        data = dtypes[index % 4]
        constants = {"BLOCK_UNITS": block, "ACC": tl.float64 if data == "fp64" else tl.float32}
        yield _lstm_cell_fwd_kernel, [*[data] * 6, "i32"], {**constants, "SAVE": True}, warps
        yield _lstm_cell_bwd_kernel, [*[data] * 7, "i32"], {**constants, "DH": True, "DC": True}, warps
