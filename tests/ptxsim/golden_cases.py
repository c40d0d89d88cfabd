"""Fixed inputs for the kernels in kernels/conformance*.cu: what the goldens of a real GPU are made of.

Most kernels have the shape name(in, out): every thread takes words of its own and puts words. How many it puts does not
matter, `out` is large enough and what nobody writes stays as it was.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tests.ptxsim import sim

KERNELS = sim.ROOT / "tests" / "ptxsim" / "kernels"
THREADS = 32
WORDS_IN, WORDS_OUT = 16, 256  # a thread


@dataclass(frozen=True)
class Case:
    """One launch. Its last argument holds the result, or the tensor of its map if `result_in_map`."""

    name: str
    source: str
    arch: str
    kernel: str
    args: Sequence
    block: int = THREADS
    smem: int = 0
    grid: int = 1
    cluster: int = 1
    result_in_map: bool = False
    approximate: bool = False  # floats of instructions whose last bits the manual leaves open

    def result(self) -> torch.Tensor:
        return self.args[0].tensor if self.result_in_map else self.args[-1]


def _generator(*names) -> torch.Generator:
    """The same numbers for the same case, whatever other cases there are."""
    seed = 0
    for byte in "-".join(map(str, names)).encode():
        seed = (seed * 257 + byte) % (1 << 31)
    return torch.Generator().manual_seed(seed)


def _bits(generator, *shape: int) -> torch.Tensor:
    """Words of random bits."""
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32)


def _floats(generator, *shape: int) -> torch.Tensor:
    """Words of floats: of all sizes, and each eighth a zero, a denormal, an infinity, a NaN or a half way."""
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-44, torch.inf, -torch.inf, torch.nan, 0.5, -1.5, 2.5, 1.0, 3e38])
    values = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-20, 20, shape, generator=generator))
    chosen = special[torch.randint(0, len(special), shape, generator=generator)]
    return torch.where(torch.randint(0, 8, shape, generator=generator) == 0, chosen, values).view(torch.int32)


def _small(generator, *shape: int) -> torch.Tensor:
    """Words of small integers."""
    return torch.randint(-40, 40, shape, generator=generator).to(torch.int32)


def _exact(generator, dtype: torch.dtype, words: int) -> torch.Tensor:
    """Words of small integers in `dtype`: their products are exact in every order of summation."""
    values = torch.randint(-8, 9, (words * 4 // dtype.itemsize,), generator=generator)
    return values.to(dtype).view(torch.int32)


_MMA = {
    "mma_bf16": torch.bfloat16,
    "mma_f16": torch.float16,
    "mma_tf32": torch.float32,
    "mma_s8": torch.int8,
    "mma_e4m3": torch.float8_e4m3fn,
}


def _inputs(kernel: str) -> Iterator[tuple[str, torch.Tensor]]:
    if kernel in _MMA:
        generator = _generator(kernel)
        sums = _exact(generator, torch.int32 if kernel == "mma_s8" else torch.float32, 4 * THREADS)
        operands = _exact(generator, _MMA[kernel], 6 * THREADS)
        yield "exact", torch.cat([operands, sums, torch.zeros(6 * THREADS, dtype=torch.int32)])
        return
    for name, make in (("bits", _bits), ("floats", _floats), ("small", _small)):
        yield name, make(_generator(kernel, name), WORDS_IN, THREADS)


def _plain(source: str, arch: str) -> Iterator[Case]:
    """The kernels of a file that take (in, out) and one warp."""
    text = (KERNELS / source).read_text()
    macros = {name for name in re.findall(r"^MMA_CONFORMANCE\((\w+), [^\\\n]*\)$", text, re.MULTILINE)}
    for kernel in re.findall(r"^CONFORMANCE\((\w+)\)", text, re.MULTILINE) + sorted(macros):
        if kernel == "mma_e4m3" and arch == "sm_80":
            continue
        blocks = 4 if kernel == "cluster_ring" else 1
        for data, words in _inputs(kernel):
            words = words.repeat(1, blocks) if blocks > 1 else words
            out = torch.zeros(WORDS_OUT * THREADS * blocks, dtype=torch.int32)
            name = f"{kernel}-{data}"
            args, open_bits = (words.contiguous(), out), kernel == "approximations"
            yield Case(name, source, arch, kernel, args, grid=blocks, cluster=blocks, approximate=open_bits)


# Descriptors (LBO, SBO, mode) that stay inside the operands, whatever the major.
_DESCRIPTORS = {"none": (128, 256, 0), "128B": (2048, 1024, 1), "64B": (1024, 512, 2), "32B": (512, 256, 3)}
_A_WORDS, _B_WORDS = 4096, 8192


def _wgmma() -> Iterator[Case]:
    source = "conformance_sm90.cu"
    text = (KERNELS / source).read_text()
    for kernel, kind, n in re.findall(r"^WGMMA_CONFORMANCE\((\w+), (\w+), (\d+),", text, re.MULTILINE):
        dtype = torch.float16 if kind == "__half" else torch.bfloat16
        for swizzle, fields in _DESCRIPTORS.items():
            generator = _generator(kernel, swizzle)
            header = torch.tensor([*fields, *fields, _A_WORDS, _B_WORDS], dtype=torch.int32)
            operands = [_exact(generator, dtype, words) for words in (_A_WORDS, _B_WORDS)]
            sums = _exact(generator, torch.float32, 64 * int(n))
            out = torch.zeros(64, int(n))
            args = (torch.cat([header, *operands, sums]), out)
            smem = 4 * (_A_WORDS + _B_WORDS)
            yield Case(f"{kernel}-{swizzle}", source, "sm_90a", kernel, args, block=128, smem=smem)


_BOXES = {1: (32,), 2: (8, 32), 3: (3, 4, 8), 4: (2, 3, 2, 8), 5: (2, 1, 2, 3, 8)}


def _tma() -> Iterator[Case]:
    """Boxes inside the tensor, over its end and before its beginning; every swizzle where the box allows it."""
    for (rank, box), swizzle, offset in itertools.product(_BOXES.items(), range(4), (1, 5, -1)):
        if box[-1] * 4 > (128, 32, 64, 128)[swizzle]:
            continue
        words = torch.Size(box).numel()
        shape = tuple(2 * size + 4 for size in box)  # rows are a multiple of 16 bytes
        header = torch.zeros(8, dtype=torch.int32)
        header[0] = words
        header[1 : 1 + rank] = offset
        name = f"{rank}d-swizzle{swizzle}-at{offset}"
        tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)
        common = {"source": "conformance_sm90.cu", "arch": "sm_90a", "smem": 4 * words}
        out = torch.zeros(words, dtype=torch.int32)
        load = (sim.TensorMap(tensor, box, swizzle), header, out)
        yield Case(f"tma_load_{name}", kernel=f"tma_load_{rank}d", args=load, **common)
        given = torch.cat([header, _bits(_generator(name), words)])
        store = (sim.TensorMap(tensor.clone(), box, swizzle), given, torch.zeros(1, dtype=torch.int32))
        yield Case(f"tma_store_{name}", kernel=f"tma_store_{rank}d", args=store, result_in_map=True, **common)


def _hopper() -> Iterator[Case]:
    yield from _plain("conformance_sm90.cu", "sm_90a")
    yield from (case for case in _plain("conformance_warp.cu", "sm_90a") if case.kernel == "mma_e4m3")


def _attention() -> Iterator[Case]:
    """The attention kernels' products of tiles, on small integers: exact in every order of summation."""
    for kernel, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)):
        generator = _generator("attention_tiles", kernel)
        own, stream = (torch.randint(-3, 4, (rows, 64), generator=generator).to(dtype) for rows in (16, 32))
        name = f"attention_tiles_{kernel}"
        args = (own, stream, torch.zeros(THREADS, 48))
        yield Case(name, "conformance_attention.cu", "sm_80", name, args, smem=48 * 64 * dtype.itemsize)


PARTS = {
    "attention": _attention,
    "scalar": lambda: _plain("conformance.cu", "sm_80"),
    "warp": lambda: _plain("conformance_warp.cu", "sm_80"),
    "hopper": _hopper,
    "wgmma": _wgmma,
    "tma": _tma,
}


def cases() -> Iterator[Case]:
    """Every case, with tensors of its own."""
    for part in PARTS.values():
        yield from part()
