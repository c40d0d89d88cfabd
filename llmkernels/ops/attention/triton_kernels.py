"""Attention in Triton: the launchers, with the signatures of the raw ops, and what tests compile ahead of time."""

import itertools

from llmkernels.ops.attention.triton_bwd import _attention_delta_kernel, _attention_dq_kernel
from llmkernels.ops.attention.triton_dkv import _attention_dkv_kernel
from llmkernels.ops.attention.triton_dmask import _attention_dmask_kernel
from llmkernels.ops.attention.triton_fwd import _attention_fwd_kernel
from llmkernels.ops.attention.triton_kvcache import (
    MERGE_ROWS,
    _attention_kvcache_kernel,
    _attention_merge_kernel,
    attention_kvcache_fwd,
)
from llmkernels.ops.attention.triton_kvcache import tiles as kvcache_tiles
from llmkernels.ops.attention.triton_launch import DELTA_ROWS, attention_bwd, attention_fwd, tiles

__all__ = ["attention_bwd", "attention_fwd", "attention_kvcache_fwd", "configurations"]

_POINTERS = {"slopes": "fp32", "sinks": "fp32", "dlse": "fp32", "row_max": "fp32", "log_sum": "fp32", "delta": "fp32",
             "parts": "fp32", "tops": "fp32", "totals": "fp32", "lengths": "*i32", "table": "*i32", "seed": "*i64",
             "ends_q": "*i32", "ends_k": "*i32", "mask": "mask", "dmask": "mask"}  # fmt: skip
_NUMBERS = ("scale", "softcap", "softcap_inverse", "keep_inverse")
_STRIDES = ("_batch", "_head", "_row", "_col", "_split")


def _type(name: str, data: str, mask: str) -> str:
    """The type of an argument in testing/triton_aot.py, by its name."""
    if name.endswith("_ptr"):
        kind = _POINTERS.get(name.removesuffix("_ptr"), data)
        return mask if kind == "mask" else kind
    if name in _NUMBERS:
        return "scalar"
    return "i64" if name.endswith(_STRIDES) else "i32"


def _configuration(kernel, constants: dict, warps: int, data: str, mask: str):
    types = [_type(name, data, mask) for name in kernel.arg_names if name not in constants]
    return kernel, types, {name: value for name, value in constants.items() if name in kernel.arg_names}, warps


_KERNELS = {"fwd": _attention_fwd_kernel, "dq": _attention_dq_kernel, "dkv": _attention_dkv_kernel,
            "dmask": _attention_dmask_kernel}  # fmt: skip
_ABSENT = ("mask_ptr", "slopes_ptr", "sinks_ptr", "seed_ptr", "ends_q_ptr", "ends_k_ptr")


def _options(which: str) -> dict:
    """Constants of a causal call, of a packed one, and of one with everything else."""
    constants = dict.fromkeys(_ABSENT)
    constants |= {"TOP_LEFT": False, "SOFTCAP": False, "LEFT": False, "RIGHT": True, "MASK_COL": 1}
    if which == "packed":
        constants |= {"LEFT": True}
        del constants["ends_q_ptr"], constants["ends_k_ptr"]
    elif which == "everything":
        constants |= {"SOFTCAP": True, "LEFT": True}
        for name in _ABSENT[:4]:
            del constants[name]
    return constants


_DESCRIPTORS = ("k_desc", "v_desc", "q_desc", "dout_desc")
_WITH_TMA = (90, 100)


def _kernel_configuration(name: str, dim: int, data: str, which: str):
    block_m, block_n, warps, stages = tiles(name, dim, 4 if data == "fp32" else 2, which == "everything")
    constants = _options("everything" if name == "dmask" else which) | dict.fromkeys(_DESCRIPTORS)
    constants |= {"D": dim, "DV": dim, "D_PAD": dim, "DV_PAD": dim, "BLOCK_M": block_m, "BLOCK_N": block_n}
    constants |= {"STAGES": stages, "SUM_ROWS": dim == 64, "SUM_COLS": dim == 128}
    mask = "*u8" if dim == 128 and name != "dmask" else data
    return _configuration(_KERNELS[name], constants, warps, data, mask)


def _described_configuration(name: str, dim: int, data: str, which: str):
    """The same with descriptors of what comes by in blocks: keys and values, or queries and dout."""
    kernel, types, constants, warps = _kernel_configuration(name, dim, data, which)
    given = iter(types)
    rows = constants["BLOCK_M" if name == "dkv" else "BLOCK_N"]
    types = [f"tensordesc<{data}[1,1,{rows},{dim}]>" if name in _DESCRIPTORS else next(given)
             for name in kernel.arg_names if name in _DESCRIPTORS or name not in constants]  # fmt: skip
    constants = {name: value for name, value in constants.items() if name not in _DESCRIPTORS}
    return kernel, types, constants, warps, _WITH_TMA


def _kvcache_configuration(dim: int, data: str, count: int, page: int, split: bool):
    block_m, block_n, warps, stages = kvcache_tiles(count, dim, 4 if data == "fp32" else 2)
    constants = {"D": dim, "DV": dim, "D_PAD": dim, "DV_PAD": dim, "BLOCK_M": block_m, "BLOCK_N": block_n}
    constants |= {"TOP_LEFT": False, "SOFTCAP": page > 0, "LEFT": page > 0, "RIGHT": True, "STAGES": stages}
    constants |= {"PAGE": page, "SPLIT": split}
    if page == 0:
        constants |= dict.fromkeys(("table_ptr", "slopes_ptr", "sinks_ptr"))
    kernel, types, constants, warps = _configuration(_attention_kvcache_kernel, constants, warps, data, "")
    if split:
        types[[name for name in kernel.arg_names if name not in constants].index("out_ptr")] = "fp32"
    return kernel, types, constants, warps


def configurations():
    """For testing/triton_aot.py: every kernel for every padded head dimension, and every option at least once."""
    for offset, name in enumerate(_KERNELS):
        for index, dim in enumerate((64, 128, 256, 512)):
            yield _kernel_configuration(name, dim, ("bf16", "fp16")[index % 2], "everything")
            if index % 2 == offset % 2:
                yield _kernel_configuration(name, dim, "fp32", "everything")
    for name in ("fwd", "dq", "dkv"):
        yield _kernel_configuration(name, 64, "bf16", "packed")
        yield _kernel_configuration(name, 128, "bf16", "causal")
    for name, which in itertools.product(("fwd", "dq", "dkv"), ("causal", "everything")):
        yield _described_configuration(name, 64, "bf16", which)
        yield _described_configuration(name, 128, "fp16", which)
    constants = {"DV": 512, "DV_PAD": 512, "BLOCK_M": DELTA_ROWS}
    yield _configuration(_attention_delta_kernel, constants, 4, "bf16", "")
    yield _kvcache_configuration(64, "bf16", 1, 16, True)
    yield _kvcache_configuration(128, "bf16", 8, 0, True)
    yield _kvcache_configuration(64, "bf16", 64, 16, False)
    yield _kvcache_configuration(128, "fp16", 64, 16, False)
    yield _kvcache_configuration(256, "bf16", 16, 16, False)
    yield _kvcache_configuration(512, "bf16", 16, 16, False)
    yield _kvcache_configuration(128, "fp32", 1, 16, False)
    yield _kvcache_configuration(512, "fp32", 1, 16, True)
    constants = {"DV": 512, "DV_PAD": 512, "BLOCK_M": MERGE_ROWS}
    yield _configuration(_attention_merge_kernel, constants, 4, "bf16", "")
