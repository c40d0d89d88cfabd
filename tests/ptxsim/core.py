"""Kernels as PTX, run on tensors and arrays: the ctypes side of capi.cpp."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import hashlib
import os
import shutil
import struct
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "ptxsim"
CACHE = ROOT / "build" / "ptx-cache"


class Fault(enum.IntEnum):
    NONE = 0
    UNKNOWN_INSTRUCTION = 1
    BAD_LAUNCH = 2
    OUT_OF_BOUNDS = 3
    MISALIGNED = 4
    UNINITIALIZED = 5
    RACE = 6
    ASYNC_IN_FLIGHT = 7
    PROXY = 8
    DIVERGENCE = 9
    BARRIER = 10
    DEADLOCK = 11
    LIMIT = 12
    TRAP = 13


EAGER, LAZY, RANDOM = 0, 1, 2


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p), ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3), ("dynamic_shared", ctypes.c_uint32), ("params", ctypes.c_char_p),
        ("param_bytes", ctypes.c_uint64), ("seed", ctypes.c_uint64), ("check", ctypes.c_int32),
        ("asynchronous", ctypes.c_int32), ("max_instructions", ctypes.c_int64), ("resident_blocks", ctypes.c_int32),
        ("cooperative", ctypes.c_int32), ("arch", ctypes.c_char_p),
    ]  # fmt: skip


class _Result(ctypes.Structure):
    _fields_ = [("fault", ctypes.c_int32), ("message", ctypes.c_void_p), ("printed", ctypes.c_void_p),
                ("counters", ctypes.c_int64 * 6)]  # fmt: skip


@dataclasses.dataclass
class Result:
    fault: Fault
    message: str
    printed: str
    warp_instructions: int
    global_requests: int
    global_sectors: int
    shared_requests: int
    shared_wavefronts: int
    mma_flops: int


class KernelError(RuntimeError):
    def __init__(self, result: Result):
        super().__init__(result.message)
        self.result = result


def build() -> Path:
    """Compile the interpreter if its sources are newer; the path of the shared library."""
    folder = Path(__file__).parent
    installed = folder / "libptxsim_c.so"  # of `make test`, which builds the same objects
    newest = max(file.stat().st_mtime for pattern in ("*.cpp", "*.h") for file in folder.glob(pattern))
    if installed.exists() and installed.stat().st_mtime >= newest:
        return installed
    configure = ["cmake", "-S", str(Path(__file__).parent), "-B", str(BUILD)]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    if not (BUILD / "CMakeCache.txt").exists():
        subprocess.run(configure, check=True, capture_output=True)
    jobs = os.environ.get("MAX_JOBS", str(max(1, (os.cpu_count() or 2) // 2)))
    done = subprocess.run(
        ["cmake", "--build", str(BUILD), "-j", jobs, "--target", "ptxsim_c"], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-8000:] + done.stderr[-4000:])
    return BUILD / "libptxsim_c.so"


_library: ctypes.CDLL | None = None


def library() -> ctypes.CDLL:
    global _library
    if _library is None:
        # A library built elsewhere, with sanitizers for instance.
        lib = ctypes.CDLL(os.environ.get("PTXSIM_LIBRARY") or str(build()))
        lib.ptxsim_load.restype = ctypes.c_void_p
        lib.ptxsim_symbol.restype = ctypes.c_void_p
        for name in ("ptxsim_kernels", "ptxsim_describe", "ptxsim_encode_tensor_map"):
            getattr(lib, name).restype = ctypes.c_void_p
        _library = lib
    return _library


def _take_text(pointer: int) -> str:
    text = ctypes.string_at(pointer).decode(errors="replace")
    library().ptxsim_free_text(ctypes.c_void_p(pointer))
    return text


def nvcc(source: str | Path, arch: str = "sm_80", *options: str) -> str:
    """The PTX of a CUDA source (text, or the path of a file), from the cache if it was compiled before."""
    is_path = isinstance(source, Path)
    text = source.read_text() if is_path else source
    flags = ["-ptx", "-lineinfo", "-std=c++17", "-O3", f"-arch={arch}", *options]
    digest = hashlib.sha256(text.encode())
    if is_path:
        for header in sorted((ROOT / "csrc").rglob("*.*h")):
            digest.update(header.read_bytes())
    digest.update(repr((flags, str(source) if is_path else "")).encode())
    cached = CACHE / f"{digest.hexdigest()[:24]}.ptx"
    if not cached.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        path = source if is_path else cached.with_suffix(".cu")
        if not is_path:
            path.write_text(text)
        out = cached.with_suffix(f".{os.getpid()}.tmp")
        done = subprocess.run(["nvcc", *flags, "-o", str(out), str(path)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr + done.stdout)
        out.replace(cached)
    return cached.read_text()


def memory(tensor) -> tuple[int, int]:
    """Address and bytes of a numpy array or a torch tensor."""
    if hasattr(tensor, "data_ptr"):
        return tensor.data_ptr(), tensor.numel() * tensor.element_size()
    return tensor.ctypes.data, tensor.nbytes


class Module:
    def __init__(self, ptx: str, name: str = "test.ptx"):
        error = ctypes.c_void_p()
        data = ptx.encode()
        self._handle = library().ptxsim_load(data, ctypes.c_uint64(len(data)), name.encode(), ctypes.byref(error))
        if not self._handle:
            raise RuntimeError(_take_text(error.value))

    def __del__(self):
        if getattr(self, "_handle", None) and library is not None:
            library().ptxsim_unload(ctypes.c_void_p(self._handle))

    def kernels(self) -> list[str]:
        return _take_text(library().ptxsim_kernels(ctypes.c_void_p(self._handle))).split()

    def find(self, *parts: str) -> str:
        """The one kernel whose name contains all parts."""
        found = [name for name in self.kernels() if all(part in name for part in parts)]
        if len(found) != 1:
            raise KeyError(f"{parts}: {found or self.kernels()}")
        return found[0]

    def describe(self, kernel: str) -> tuple[list[tuple[int, int]], int]:
        """(offset, size) of each parameter, and bytes of static shared memory."""
        text = _take_text(library().ptxsim_describe(ctypes.c_void_p(self._handle), kernel.encode()))
        if text.startswith("!"):
            raise RuntimeError(text[1:])
        *params, shared = text.split("\n")
        return [tuple(map(int, line.split())) for line in params], int(shared)

    def symbol(self, name: str) -> tuple[int, int]:
        size = ctypes.c_uint64()
        address = library().ptxsim_symbol(ctypes.c_void_p(self._handle), name.encode(), ctypes.byref(size))
        return address or 0, size.value

    def launch(self, kernel, grid=1, block=32, args=(), *, shared=0, cluster=1, seed=0, check=True, asynchronous=RANDOM,
               max_instructions=1 << 28, resident=4, cooperative=False, arch="sm_80", names=(), raises=True):  # fmt: skip
        """Run a kernel. Arrays and tensors become pointers, ints and floats take the size of their parameter, bytes go as they are."""
        layout, _ = self.describe(kernel)
        params = bytearray(sum(layout[-1]) if layout else 0)
        regions = []
        for i, arg in enumerate(args):
            offset, size = layout[i]
            if hasattr(arg, "data_ptr") or hasattr(arg, "ctypes"):
                address, count = memory(arg)
                if count:
                    regions.append((address, count, names[i] if i < len(names) else f"argument {i}"))
                arg = address
            if isinstance(arg, (bytes, bytearray)):
                data = bytes(arg)
            elif isinstance(arg, float):
                data = struct.pack("<d" if size == 8 else "<f", arg)
            else:
                data = (int(arg) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
            params[offset : offset + len(data)] = data

        def three(value):
            value = (value,) if isinstance(value, int) else tuple(value)
            return (ctypes.c_uint32 * 3)(*(*value, 1, 1, 1)[:3])

        request = _Launch(kernel.encode(), three(grid), three(block), three(cluster), shared, bytes(params), len(params),
                          seed, int(check), asynchronous, max_instructions, resident, int(cooperative), arch.encode())  # fmt: skip
        out = _Result()
        lib = library()
        for address, count, name in regions:
            lib.ptxsim_add(ctypes.c_void_p(address), ctypes.c_uint64(count), name.encode())
        try:
            lib.ptxsim_launch(ctypes.c_void_p(self._handle), ctypes.byref(request), ctypes.byref(out))
        finally:
            for address, _, _ in regions:
                lib.ptxsim_remove(ctypes.c_void_p(address))
        result = Result(Fault(out.fault), _take_text(out.message), _take_text(out.printed), *out.counters)
        if raises and result.fault:
            raise KernelError(result)
        return result


class registered:
    """Makes further tensors known to kernels while the block runs."""

    def __init__(self, *tensors, names=()):
        self._tensors, self._names = tensors, names

    def __enter__(self):
        for i, tensor in enumerate(self._tensors):
            address, count = memory(tensor)
            name = self._names[i] if i < len(self._names) else ""
            library().ptxsim_add(ctypes.c_void_p(address), ctypes.c_uint64(count), name.encode())

    def __exit__(self, *_):
        for tensor in self._tensors:
            library().ptxsim_remove(ctypes.c_void_p(memory(tensor)[0]))


def tensor_map(
    tensor, sizes, strides, box, *, element_bytes, swizzle=0, nan_fill=False, interleave=0, element_strides=None
):
    """128 bytes of a CUtensorMap; sizes and box innermost first, strides in bytes without the innermost."""
    rank = len(sizes)
    out = (ctypes.c_ubyte * 128)()
    base = tensor if isinstance(tensor, int) else memory(tensor)[0]
    error = _take_text(library().ptxsim_encode_tensor_map(
        out, element_bytes, rank, ctypes.c_void_p(base), (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * max(1, rank - 1))(*strides), (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*(element_strides or [1] * rank)), interleave, swizzle, int(nan_fill)))  # fmt: skip
    if error:
        raise ValueError(error)
    return bytes(out)
