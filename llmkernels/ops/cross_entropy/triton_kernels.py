"""Cross entropy in Triton: kernels and launchers, with the signatures of the raw ops. The maths is in reference.py.

The forward has one program for each row, the backward one for BLOCK_COLS columns of a row.
"""

import struct

import torch
import triton
import triton.language as tl

from llmkernels._dtypes import accumulate_dtype
from llmkernels._triton import TL_DTYPE, as_rows, cast

MAX_BLOCK = 4096  # columns of a program at a time: 16 values a thread
THREAD_VALUES = 16
INDEX, SMOOTHED_INDEX, PROBABILITIES = 0, 1, 2

# Numbers that must keep the digits of fp64: Triton passes floats as fp32, so their bits travel as an integer.
_BITS = ("confidence_bits", "spread_bits", "z_bits", "cap_bits")


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def config(cols: int) -> tuple[int, int]:
    """(BLOCK_COLS, num_warps) for rows of `cols` columns."""
    block = min(triton.next_power_of_2(max(cols, 32)), MAX_BLOCK)
    return block, max(block // (32 * THREAD_VALUES), 1)


@triton.jit
def _number(bits, ACC: tl.constexpr):
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def _capped(x, cap, ACC: tl.constexpr):
    """cap * tanh(x / cap), and its slope.

    tanh(y) = (1 - e) / (1 + e) with e = exp(-2 y) for y > 0. Below 1/2 the difference cancels; there a Pade approximant
    of tanh is within 2e-9, and Lambert's continued fraction, for fp64, within 1e-18.
    """
    y = x / cap
    size = tl.abs(y)
    e = tl.exp(-2.0 * size)
    y2 = y * y
    if tl.float64 == ACC:
        near = 1.0 + y2 / (
            3.0 + y2 / (5.0 + y2 / (7.0 + y2 / (9.0 + y2 / (11.0 + y2 / (13.0 + y2 / (15.0 + y2 / 17.0))))))
        )
        near = size / near
    else:
        near = size * (945.0 + y2 * (105.0 + y2)) / (945.0 + y2 * (420.0 + 15.0 * y2))
    t = tl.where(size < 0.5, near, (1.0 - e) / (1.0 + e))
    slope = tl.where(size < 0.5, 1.0 - t * t, 4.0 * e / ((1.0 + e) * (1.0 + e)))
    return cap * tl.where(y < 0.0, -t, t), slope


@triton.jit
def _own(target_ptr, weight_ptr, row, cols, ignore_index, confidence, WEIGHT: tl.constexpr):
    """Of a row with an index: (index, whether it is ignored, whether it is a class, what it adds to q)."""
    index = tl.load(target_ptr + row)
    ignored = index == ignore_index
    known = (index >= 0) & (index < cols) & (index != ignore_index)
    index = tl.where(known, index, 0)
    own = confidence
    if WEIGHT:
        own = confidence * tl.load(weight_ptr + index)
    return index, ignored, known, own


@triton.jit
def _q(target_ptr, weight_ptr, row, target_stride, at, mask, confidence, spread,
       KIND: tl.constexpr, WEIGHT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """q of the columns `at`, but for what an index itself adds."""
    q = tl.zeros(at.shape, ACC) + spread
    if KIND == 2:
        q += confidence * tl.load(target_ptr + row * target_stride + at, mask=mask, other=0.0).to(ACC)
    if WEIGHT:
        q *= tl.load(weight_ptr + at, mask=mask, other=0.0)
    return q


@triton.jit
def _store_gradient(
    dinput_ptr, input_ptr, target_ptr, weight_ptr, row, input_stride, target_stride, cols, start, ignored, known, index,
    own, dloss, largest, log_sum, mass, confidence, spread, z_loss, cap,
    KIND: tl.constexpr, WEIGHT: tl.constexpr, CAP: tl.constexpr, BLOCK_COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of the columns from `start` on. Rows without one are not read."""
    at = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
    mask = at < cols
    u = tl.load(input_ptr + row * input_stride + at, mask=mask & known, other=0.0).to(ACC)
    if CAP:
        u, slope = _capped(u, cap, ACC)
    value = dloss * (mass + 2.0 * z_loss * (largest + log_sum)) * tl.exp((u - largest) - log_sum)
    if KIND != 0:
        q = _q(target_ptr, weight_ptr, row, target_stride, at, mask & known, confidence, spread, KIND, WEIGHT, ACC)
        value -= dloss * q
    if KIND != 2:
        value -= tl.where(at == index, dloss * own, 0.0)
    if CAP:
        value *= slope
    value = tl.where(ignored, 0.0, tl.where(known, value, float("nan")))
    tl.store(dinput_ptr + row * cols + at, cast(value, dinput_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_BITS)
def _cross_entropy_fwd_kernel(
    input_ptr,  # [rows, cols] T, row stride input_stride
    target_ptr,  # [rows] int64, or [rows, cols] T or ACC, row stride target_stride
    weight_ptr,  # [cols] ACC; unused unless WEIGHT
    dloss_ptr,  # [rows] ACC, stride dloss_stride; unused unless GRADIENT
    loss_ptr,  # [rows] ACC
    stats_ptr,  # [3, rows] ACC
    dinput_ptr,  # [rows, cols] T; unused unless GRADIENT
    input_stride,
    target_stride,
    dloss_stride,
    rows,
    cols,
    ignore_index,
    confidence_bits,
    spread_bits,
    z_bits,
    cap_bits,
    KIND: tl.constexpr,
    WEIGHT: tl.constexpr,
    CAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    confidence, spread = _number(confidence_bits, ACC), _number(spread_bits, ACC)
    z_loss, cap = _number(z_bits, ACC), _number(cap_bits, ACC)
    ignored, known, index, own = False, True, tl.zeros((), tl.int64), confidence
    if KIND != 2:
        index, ignored, known, own = _own(target_ptr, weight_ptr, row, cols, ignore_index, confidence, WEIGHT)

    # Relative to `largest` as far as it is known: the sum of exp(u - largest), and of q (u - largest). While there was
    # nothing but -Inf they are relative to zero, so that no NaN arises.
    largest = tl.zeros((), ACC) - float("inf")
    shift, total, dot, mass = tl.zeros((), ACC), tl.zeros((), ACC), tl.zeros((), ACC), tl.zeros((), ACC)
    for start in range(0, cols, BLOCK_COLS):
        at = start + tl.arange(0, BLOCK_COLS).to(tl.int64)
        mask = at < cols
        u = tl.load(input_ptr + row * input_stride + at, mask=mask & known, other=0.0).to(ACC)
        if CAP:
            u, _ = _capped(u, cap, ACC)
        u = tl.where(mask, u, -float("inf"))
        nothing = largest == -float("inf")
        largest = tl.maximum(largest, tl.max(u, 0))
        before, shift = shift, tl.where(largest == -float("inf"), 0.0, largest)
        factor = tl.exp(tl.where(nothing, 0.0, before - shift))
        total = total * factor + tl.sum(tl.exp(u - shift), 0)
        if KIND != 0:
            q = _q(target_ptr, weight_ptr, row, target_stride, at, mask & known, confidence, spread, KIND, WEIGHT, ACC)
            q = tl.where(mask, q, 0.0)
            dot += mass * (before - shift) + tl.sum(q * tl.where(mask, u - shift, 0.0), 0)
            mass += tl.sum(q, 0)
    log_sum = tl.where(largest == -float("inf"), float("nan"), tl.log(total))
    if KIND != 2:
        u_own = tl.load(input_ptr + row * input_stride + index, mask=known, other=0.0).to(ACC)
        if CAP:
            u_own, _ = _capped(u_own, cap, ACC)
        dot += own * (u_own - shift)
        mass += own
    lse = largest + log_sum
    loss = mass * log_sum - dot + z_loss * lse * lse
    loss = tl.where(ignored, 0.0, tl.where(known, loss, float("nan")))
    tl.store(loss_ptr + row, loss)
    tl.store(stats_ptr + row, largest)
    tl.store(stats_ptr + rows + row, log_sum)
    tl.store(stats_ptr + 2 * rows.to(tl.int64) + row, mass)
    if GRADIENT:
        dloss = tl.load(dloss_ptr + row * dloss_stride)
        for start in range(0, cols, BLOCK_COLS):
            _store_gradient(
                dinput_ptr, input_ptr, target_ptr, weight_ptr, row, input_stride, target_stride, cols, start, ignored,
                known, index, own, dloss, largest, log_sum, mass, confidence, spread, z_loss, cap,
                KIND, WEIGHT, CAP, BLOCK_COLS, ACC,
            )  # fmt: skip


@triton.jit(do_not_specialize=_BITS)
def _cross_entropy_bwd_kernel(
    input_ptr,  # [rows, cols] T, row stride input_stride
    target_ptr,  # [rows] int64, or [rows, cols] T or ACC, row stride target_stride
    weight_ptr,  # [cols] ACC; unused unless WEIGHT
    dloss_ptr,  # [rows] ACC, stride dloss_stride
    stats_ptr,  # [3, rows] ACC
    dinput_ptr,  # [rows, cols] T
    input_stride,
    target_stride,
    dloss_stride,
    rows,
    cols,
    ignore_index,
    confidence_bits,
    spread_bits,
    z_bits,
    cap_bits,
    KIND: tl.constexpr,
    WEIGHT: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks = tl.cdiv(cols, BLOCK_COLS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_COLS
    confidence, spread = _number(confidence_bits, ACC), _number(spread_bits, ACC)
    z_loss, cap = _number(z_bits, ACC), _number(cap_bits, ACC)
    ignored, known, index, own = False, True, tl.zeros((), tl.int64), confidence
    if KIND != 2:
        index, ignored, known, own = _own(target_ptr, weight_ptr, row, cols, ignore_index, confidence, WEIGHT)
    dloss = tl.load(dloss_ptr + row * dloss_stride)
    largest, log_sum = tl.load(stats_ptr + row), tl.load(stats_ptr + rows + row)
    mass = tl.load(stats_ptr + 2 * rows.to(tl.int64) + row)
    _store_gradient(
        dinput_ptr, input_ptr, target_ptr, weight_ptr, row, input_stride, target_stride, cols, start, ignored, known,
        index, own, dloss, largest, log_sum, mass, confidence, spread, z_loss, cap,
        KIND, WEIGHT, CAP, BLOCK_COLS, ACC,
    )  # fmt: skip


def _arguments(input, target, weight, label_smoothing, z_loss, softcap):
    """(input rows, target, strides of both, bits of the numbers, constants, warps)."""
    rows, cols = input.shape
    input_rows, input_stride = as_rows(input, rows, cols)
    kind, target_stride = PROBABILITIES, 0
    if target.is_floating_point():
        target, target_stride = as_rows(target, rows, cols)
    else:
        target, kind = target.contiguous(), INDEX if label_smoothing == 0.0 else SMOOTHED_INDEX
    block, warps = config(cols)
    bits = tuple(map(_bits, (1.0 - label_smoothing, label_smoothing / cols, z_loss, softcap)))
    acc = TL_DTYPE[accumulate_dtype(input.dtype)]
    constants = {"KIND": kind, "WEIGHT": weight is not None, "CAP": softcap != 0.0, "BLOCK_COLS": block, "ACC": acc}
    return input_rows, target, input_stride, target_stride, bits, constants, warps


def cross_entropy_fwd(input, target, weight, dloss, ignore_index, label_smoothing, z_loss, softcap):
    rows, cols = input.shape
    acc = accumulate_dtype(input.dtype)
    loss = torch.empty(rows, dtype=acc, device=input.device)
    stats = torch.empty((3, rows), dtype=acc, device=input.device)
    dinput = torch.empty(input.shape if dloss is not None else 0, dtype=input.dtype, device=input.device)
    if rows == 0:
        return loss, stats, dinput
    input_rows, target, input_stride, target_stride, bits, constants, warps = _arguments(
        input, target, weight, label_smoothing, z_loss, softcap
    )
    with torch.cuda.device_of(input):
        _cross_entropy_fwd_kernel[(rows,)](
            input_rows, target, loss if weight is None else weight.contiguous(), loss if dloss is None else dloss, loss,
            stats, dinput, input_stride, target_stride, 0 if dloss is None else dloss.stride(0), rows, cols,
            ignore_index, *bits, GRADIENT=dloss is not None, **constants, num_warps=warps,
        )  # fmt: skip
    return loss, stats, dinput


def cross_entropy_bwd(dloss, input, target, weight, stats, ignore_index, label_smoothing, z_loss, softcap):
    rows, cols = input.shape
    dinput = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    if rows == 0:
        return dinput
    input_rows, target, input_stride, target_stride, bits, constants, warps = _arguments(
        input, target, weight, label_smoothing, z_loss, softcap
    )
    with torch.cuda.device_of(input):
        _cross_entropy_bwd_kernel[(rows * triton.cdiv(cols, constants["BLOCK_COLS"]),)](
            input_rows, target, stats if weight is None else weight.contiguous(), dloss, stats.contiguous(), dinput,
            input_stride, target_stride, dloss.stride(0), rows, cols, ignore_index, *bits, **constants, num_warps=warps,
        )  # fmt: skip
    return dinput


def configurations():
    """For testing/triton_aot.py: every block size, kind of target and flag, and every dtype."""
    dtypes = ("bf16", "fp16", "fp32", "fp64")
    for index, cols in enumerate((32, 64, 128, 256, 512, 1024, 2048, 4096, 4097)):
        block, warps = config(cols)
        kind, data = index % 3, dtypes[index % 4]
        acc = "fp64" if data == "fp64" else "fp32"
        constants = {
            "KIND": kind,
            "WEIGHT": index % 2 == 0,
            "CAP": index // 3 % 2 == 1 or data == "fp64",
            "BLOCK_COLS": block,
            "ACC": tl.float64 if data == "fp64" else tl.float32,
        }
        target = data if kind == PROBABILITIES else "*i64"
        numbers = [*["i64"] * 3, "i32", "i32", "i64", *["i64"] * 4]
        types = [data, target, *[acc] * 4, data, *numbers]
        yield _cross_entropy_fwd_kernel, types, {**constants, "GRADIENT": index % 2 == 1}, warps
        types = [data, target, *[acc] * 3, data, *numbers]
        yield _cross_entropy_bwd_kernel, types, constants, warps
