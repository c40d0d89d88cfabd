"""swiglu, geglu and reglu in Triton: kernels and launchers, with the signatures of the raw ops.

A program takes BLOCK_COLS columns of one row. Tensors without gaps are one long row.
"""

import torch
import triton
import triton.language as tl

from llmkernels._dtypes import accumulate_dtype
from llmkernels._triton import TL_DTYPE, as_rows, cast

MAX_BLOCK = 1024  # columns of a program: 8 values a thread, 16 bytes of a 16-bit tensor
THREAD_VALUES = 8

# gelu_tanh: 1 + tanh(u) = 2 / (1 + exp(-2 u)) with 2 u = g * (_TANH_SCALE + _TANH_CUBIC * g^2)
_TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 * sqrt(2 / pi)
_TANH_CUBIC = tl.constexpr(1.5957691216057308 * 0.044715)


def config(cols: int) -> tuple[int, int]:
    """(BLOCK_COLS, num_warps) for rows of `cols` columns."""
    block = min(triton.next_power_of_2(max(cols, 32)), MAX_BLOCK)
    return block, max(block // (32 * THREAD_VALUES), 1)


@triton.jit
def activated(g, ACTIVATION: tl.constexpr, ACC: tl.constexpr):
    """act(g) and its slope; for relu only the first is used."""
    one = tl.full(g.shape, 1.0, ACC)
    if ACTIVATION == "silu":
        s = one / (one + tl.exp(-g))
        value = g * s
        slope = s * (1.0 + g * (1.0 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value = g * cdf
        slope = cdf + g * (tl.exp(-0.5 * g * g) * 0.3989422804014327)
    elif ACTIVATION == "gelu_tanh":
        s = one / (one + tl.exp(-g * (_TANH_SCALE + _TANH_CUBIC * g * g)))
        value = g * s
        slope = s * (1.0 + g * (1.0 - s) * (_TANH_SCALE + 3.0 * _TANH_CUBIC * g * g))
    else:
        value = tl.where(g < 0.0, 0.0, g)  # a NaN stays
        slope = one
    return value, slope


@triton.jit
def _place(cols, BLOCK_COLS: tl.constexpr):
    """(row, columns, mask) of this program."""
    blocks = tl.cdiv(cols, BLOCK_COLS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    return row, at, at < cols


@triton.jit
def _gated_fwd_kernel(
    gate_ptr,  # [rows, cols] T, row stride gate_stride
    up_ptr,  # [rows, cols] T, row stride up_stride
    y_ptr,  # [rows, cols] T
    gate_stride,
    up_stride,
    cols,
    ACTIVATION: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    row, at, mask = _place(cols, BLOCK_COLS)
    gate = tl.load(gate_ptr + row * gate_stride + at, mask=mask, other=0.0).to(ACC)
    up = tl.load(up_ptr + row * up_stride + at, mask=mask, other=0.0).to(ACC)
    value, _ = activated(gate, ACTIVATION, ACC)
    tl.store(y_ptr + row * cols + at, cast(value * up, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_bwd_kernel(
    dy_ptr,  # [rows, cols] T, row stride dy_stride
    gate_ptr,  # [rows, cols] T, row stride gate_stride
    up_ptr,  # [rows, cols] T, row stride up_stride
    dgate_ptr,  # [rows, cols] T, row stride grad_stride; unused unless DGATE
    dup_ptr,  # [rows, cols] T, row stride grad_stride; unused unless DUP
    dy_stride,
    gate_stride,
    up_stride,
    grad_stride,
    cols,
    ACTIVATION: tl.constexpr,
    DGATE: tl.constexpr,
    DUP: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    row, at, mask = _place(cols, BLOCK_COLS)
    dy = tl.load(dy_ptr + row * dy_stride + at, mask=mask, other=0.0).to(ACC)
    gate = tl.load(gate_ptr + row * gate_stride + at, mask=mask, other=0.0).to(ACC)
    value, slope = activated(gate, ACTIVATION, ACC)
    if DGATE:
        up = tl.load(up_ptr + row * up_stride + at, mask=mask, other=0.0).to(ACC)
        if ACTIVATION == "relu":
            dgate = tl.where(gate <= 0.0, 0.0, dy * up)  # chosen, so that Inf times zero is zero as in torch
        else:
            dgate = dy * up * slope
        tl.store(dgate_ptr + row * grad_stride + at, cast(dgate, dgate_ptr.dtype.element_ty), mask=mask)
    if DUP:
        tl.store(dup_ptr + row * grad_stride + at, cast(dy * value, dup_ptr.dtype.element_ty), mask=mask)


def _join(rows, cols, *strides):
    """(rows, cols) of the same elements: one row if every tensor has its rows behind each other."""
    return (1, rows * cols) if all(stride == cols for stride in strides) else (rows, cols)


def _factors(gate, up):
    """(y's shape, rows, cols, gate rows, gate stride, up rows, up stride)."""
    shape = gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)
    cols = shape[-1] if shape else 1
    rows = 1
    for size in shape[:-1]:
        rows *= size
    if up is None:
        both, stride = as_rows(gate, rows, 2 * cols)
        return shape, rows, cols, both[:, :cols], stride, both[:, cols:], stride
    return shape, rows, cols, *as_rows(gate, rows, cols), *as_rows(up, rows, cols)


def gated_fwd(gate, up, activation):
    shape, rows, cols, gate_rows, gate_stride, up_rows, up_stride = _factors(gate, up)
    y = torch.empty(shape, dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    rows, cols = _join(rows, cols, gate_stride, up_stride)
    block, warps = config(cols)
    with torch.cuda.device_of(gate):
        _gated_fwd_kernel[(rows * triton.cdiv(cols, block),)](
            gate_rows, up_rows, y, gate_stride, up_stride, cols,
            ACTIVATION=activation, BLOCK_COLS=block, ACC=TL_DTYPE[accumulate_dtype(gate.dtype)], num_warps=warps,
        )  # fmt: skip
    return y


def gated_bwd(dy, gate, up, activation, wanted):
    shape, rows, cols, gate_rows, gate_stride, up_rows, up_stride = _factors(gate, up)
    packed = up is None
    dgate = torch.empty(gate.shape if wanted[0] else 0, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(shape if wanted[1] and not packed else 0, dtype=gate.dtype, device=gate.device)
    want_dgate, want_dup = wanted[0], wanted[0] if packed else wanted[1]
    if dy.numel() == 0 or not (want_dgate or want_dup):
        return dgate, dup
    dy_rows, dy_stride = as_rows(dy, rows, cols)
    grads = (dgate, dup)
    grad_stride = cols
    if packed:
        both = dgate.view(rows, 2 * cols)
        grads, grad_stride = (both[:, :cols], both[:, cols:]), 2 * cols
    rows, cols = _join(rows, cols, dy_stride, gate_stride, up_stride, grad_stride)
    block, warps = config(cols)
    with torch.cuda.device_of(gate):
        _gated_bwd_kernel[(rows * triton.cdiv(cols, block),)](
            dy_rows, gate_rows, up_rows, *grads, dy_stride, gate_stride, up_stride, grad_stride, cols,
            ACTIVATION=activation, DGATE=want_dgate, DUP=want_dup,
            BLOCK_COLS=block, ACC=TL_DTYPE[accumulate_dtype(gate.dtype)], num_warps=warps,
        )  # fmt: skip
    return dgate, dup


def configurations():
    """For testing/triton_aot.py: every block size and activation, and every dtype at least once."""
    dtypes = ("bf16", "fp16", "fp32", "fp64")
    for index, cols in enumerate((32, 64, 128, 256, 512, 1024, 1025)):
        block, warps = config(cols)
        for offset, activation in enumerate(("silu", "gelu", "gelu_tanh", "relu")):
            data = dtypes[(index + offset) % 4]
            constants = {
                "ACTIVATION": activation,
                "BLOCK_COLS": block,
                "ACC": tl.float64 if data == "fp64" else tl.float32,
            }
            yield _gated_fwd_kernel, [*[data] * 3, "i64", "i64", "i32"], constants, warps
            types = [*[data] * 5, *["i64"] * 4, "i32"]
            yield _gated_bwd_kernel, types, {**constants, "DGATE": True, "DUP": True}, warps
