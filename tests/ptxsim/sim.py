"""CUDA kernels on CPU tensors: the PTX that nvcc makes of them, executed and checked by an interpreter.

    y = torch.empty_like(x)
    sim.launch("scale", 4, 128, 0, x, y, 3.0, source="tests/ptxsim/kernels/scale.cu", arch="sm_80")

runs one kernel; `with sim.device(arch="sm_80"):` says on which GPU the library's own launchers run theirs.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "ptx-cache"
ARCHITECTURES = ("sm_80", "sm_90a")
NVCC_FLAGS = ("-ptx", "-std=c++17", "-O3", "-lineinfo", f"-I{ROOT / 'csrc'}")  # the product's, see CMakeLists.txt
BUILD = "make test, or LLMKERNELS_BUILD_TESTS=1 python setup.py build_ext --inplace"

Size = int | Sequence[int]


class Fault(RuntimeError):
    """What stopped a kernel. `kind` is the interpreter's word for it, such as "out of bounds"."""

    def __init__(self, kind: str, message: str):
        super().__init__(message if message.startswith(kind) else f"{kind}: {message}")
        self.kind = kind


# --- the module and the compiler -------------------------------------------------------------------------------------


@functools.cache
def nvcc() -> str | None:
    default = Path("/usr/local/cuda/bin/nvcc")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or (str(default) if default.exists() else None)


def nvcc_absent() -> str | None:
    """Why nothing can be simulated on this machine, or None: then it must be."""
    facts = ROOT / "llmkernels" / "_build_facts.json"
    if not facts.exists():
        return f"not built ({BUILD})"
    reason = json.loads(facts.read_text())["absent"].get("cuda")
    if reason is not None:
        return f"not built ({reason})"
    return None if nvcc() else "nvcc was not found"


def absent() -> str | None:
    """Why nothing can be simulated, or None."""
    reason = nvcc_absent()
    if reason is None and not _file().exists():
        reason = f"tests/ptxsim/{_file().name} is not built ({BUILD})"
    return reason


def _file() -> Path:
    return Path(__file__).with_name("_ptxsim" + sysconfig.get_config_var("EXT_SUFFIX"))


@functools.cache
def module() -> ModuleType:
    """The compiled module; `absent()` is None."""
    import llmkernels  # noqa: F401  (defines the schemas that the module implements)
    from tests.ptxsim import _ptxsim

    built_for = _ptxsim.build_info()["torch"]
    if built_for != torch.__version__:
        raise ImportError(f"{_file().name}: built for torch {built_for}, but torch {torch.__version__} runs ({BUILD})")
    return _ptxsim


def compile_ptx(source: str | Path, arch: str, defines: Sequence[str] = ()) -> str:
    """PTX of a .cu file. `defines` are "NAME" or "NAME=value". Cached by what every file it includes contains."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch is {arch!r}, expected one of {', '.join(ARCHITECTURES)}")
    source = ROOT / source
    command = [nvcc(), *NVCC_FLAGS, f"-arch={arch}", *(f"-D{define}" for define in defines)]
    named = CACHE / hashlib.sha256("\0".join([*command, str(source)]).encode()).hexdigest()[:20]
    includes = named.with_suffix(".d")
    if includes.exists() and (cached := _cached(named, includes.read_text())) is not None and cached.exists():
        return cached.read_text()
    CACHE.mkdir(parents=True, exist_ok=True)
    temporary = named.with_suffix(f".{os.getpid()}.ptx")
    run = subprocess.run(
        [*command, "-MD", "-MF", f"{temporary}.d", "-o", temporary, source], capture_output=True, text=True
    )
    if run.returncode != 0:
        raise RuntimeError(f"nvcc cannot compile {source} for {arch}:\n{run.stderr[-4000:]}")
    os.replace(f"{temporary}.d", includes)
    cached = _cached(named, includes.read_text())
    os.replace(temporary, cached)
    return cached.read_text()


def _cached(named: Path, makefile: str) -> Path | None:
    """Where the PTX lies for these contents of the files of a make rule; None if one is gone."""
    files = [Path(word) for word in makefile.split(":", 1)[1].replace("\\\n", " ").split()]
    digest = hashlib.sha256()
    for file in files:
        if not file.exists():
            return None
        if str(file).startswith(str(ROOT)):  # the rest is the toolkit and the system: as old as nvcc
            digest.update(file.read_bytes())
    return named.with_suffix(f".{digest.hexdigest()[:20]}.ptx")


@functools.lru_cache(maxsize=64)
def load(ptx: str, name: str):
    """The parsed module of a PTX text; `name` appears in messages."""
    return module().load(ptx, name)


# --- the emulated GPU ------------------------------------------------------------------------------------------------


@dataclass
class Launches:
    """What ran inside `with sim.device(record=True) as launches`: a dict each, with counters, once it has ended."""

    all: list[dict] = field(default_factory=list)


@contextlib.contextmanager
def device(
    *,
    arch: str | None = None,
    multiprocessors: int | None = None,
    registers: int | None = None,
    seed: int | None = None,
    check: bool | None = None,
    async_mode: str | None = None,
    max_instructions: int | None = None,
    resident_blocks: int | None = None,
    record: bool | None = None,
) -> Iterator[Launches]:
    """The GPU of this thread, and how it runs kernels. What is None stays as an outer context has set it.

    seed: of the schedule and of async_mode "random". check: races, uninitialised shared memory, proxies (bounds and
    alignment always). async_mode: when asynchronous copies land, "eager", "lazy" or "random". multiprocessors: 1 unless
    told. registers: of a multiprocessor, as planners see it; fewer than 65536 make small cases keep less in them.
    record: keep the counters of every launch.
    """
    sim = module()
    before = sim.device()
    changed = sim.Device(before)
    given = {"arch": arch, "multiprocessors": multiprocessors, "seed": seed, "check": check, "record": record}
    given |= {"registers": registers, "max_instructions": max_instructions, "resident_blocks": resident_blocks}
    given |= {"async_mode": None if async_mode is None else getattr(sim.Async, async_mode)}
    for name, value in given.items():
        if value is not None:
            setattr(changed, name, value)
    launches = Launches()
    sim.set_device(changed)
    try:
        yield launches
    finally:
        sim.set_device(before)
        if record:
            launches.all = sim.take_launches()


@contextlib.contextmanager
def tracking() -> Iterator[None]:
    """Tensors made here, also by kernels' launchers, are memory of the GPU: exact to the byte, and NaN at first."""
    before = module().track(True)
    try:
        yield
    finally:
        module().track(before)


@contextlib.contextmanager
def visible(tensors: dict[str, torch.Tensor | None], *, whole_storage: bool = False) -> Iterator[None]:
    """Kernels may touch these tensors here: from their first to their last element, or all of their storages."""
    sim, added = module(), []
    for name, tensor in tensors.items():
        if tensor is None or tensor.numel() == 0 or sim.is_tracked(tensor.untyped_storage().data_ptr()):
            continue
        begin, size = tensor.data_ptr(), tensor.element_size()
        size += sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)) * size
        if whole_storage:
            begin, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        sim.add_region(begin, size, f"{name}, {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
        added.append(begin)
    try:
        yield
    finally:
        for begin in added:
            sim.remove_region(begin)


# --- one kernel ------------------------------------------------------------------------------------------------------


class Swizzle:
    """The swizzle of a tensor map, as the driver numbers it."""

    NONE, B32, B64, B128 = range(4)


@dataclass(frozen=True)
class TensorMap:
    """An argument of type CUtensorMap over `tensor`, innermost dimension last, as in torch; `box` likewise.

    What cuTensorMapEncodeTiled would refuse is a ValueError.
    """

    tensor: torch.Tensor
    box: tuple[int, ...]
    swizzle: int = Swizzle.NONE
    element_strides: tuple[int, ...] | None = None
    nan_fill: bool = False

    def encode(self) -> bytes:
        tensor, size = self.tensor, self.tensor.element_size()
        if tensor.stride(-1) != 1:
            raise ValueError(f"tensor map: the innermost stride is {tensor.stride(-1)}, expected 1")
        strides = [stride * size for stride in reversed(tensor.stride()[:-1])]
        element_strides = self.element_strides or (1,) * tensor.dim()
        return module().tensor_map(
            size, tensor.data_ptr(), [*reversed(tensor.shape)], strides, [*reversed(self.box)],
            [*reversed(element_strides)], 0, self.swizzle, self.nan_fill,
        )  # fmt: skip


def launch(
    kernel: str,
    grid: Size,
    block: Size,
    smem: int,
    *args,
    source: str | Path | None = None,
    ptx: str | None = None,
    arch: str = "sm_80",
    defines: Sequence[str] = (),
    cluster: Size | None = None,
    cooperative: bool = False,
    **settings,
) -> dict[str, int]:
    """Run one kernel of `source` (or of a `ptx` text) to its end; its counters.

    kernel: the name of the .entry, or a name as it is written in the source if only one kernel has it.
    args: a tensor is its pointer and its storage becomes visible; None a null pointer; int and float are as wide as
    the parameter; a TensorMap, a ctypes structure, a numpy scalar or bytes are passed as they are.
    settings: seed, check, async_mode, ... of `device`; here seed is 0, check True, async_mode "random" unless told.
    Raises Fault.
    """
    if ptx is None:
        ptx, name = compile_ptx(source, arch, defines), Path(source).name
    else:
        name = "ptx"
    loaded = load(ptx, name)
    entry = _entry(loaded, kernel)
    tensors = {f"argument {i}": arg.tensor if isinstance(arg, TensorMap) else arg for i, arg in enumerate(args)}
    tensors = {name: arg for name, arg in tensors.items() if isinstance(arg, torch.Tensor)}
    settings = {"seed": 0, "check": True, "async_mode": "random", **settings}
    with device(arch=arch, **settings), visible(tensors, whole_storage=True):
        return run(loaded, entry, grid, block, smem, args, cluster or 1, cooperative)


def run(loaded, entry, grid: Size, block: Size, smem: int, args, cluster: Size = 1, cooperative=False) -> dict:
    """Run an entry of a loaded module on the device as it is; its counters. Raises Fault."""
    sizes = [three(size) for size in (grid, block, cluster)]
    result = module().launch(loaded, entry, *sizes, smem, pack(loaded.params(entry), args), cooperative)
    if result.printed:
        print(result.printed, end="")
    if result.fault is not None:
        raise Fault(result.fault, result.message)
    return result.counters


def three(size: Size) -> tuple[int, ...]:
    given = (size,) if isinstance(size, int) else tuple(size)
    return given + (1,) * (3 - len(given))


def _entry(loaded, kernel: str) -> str:
    names = loaded.kernels()
    if kernel in names:
        return kernel
    # In a mangled name the word stands behind its length, and what follows is no part of the word.
    found = [name for name in names if f"{len(kernel)}{kernel}" in name]
    if len(found) != 1:
        raise ValueError(f"{len(found)} kernels are called {kernel!r}; there are: {', '.join(found or names)}")
    return found[0]


_INTS = {1: "b", 2: "h", 4: "i", 8: "q"}
_FLOATS = {4: "f", 8: "d"}


def pack(params: Sequence[Sequence[int]], args: Sequence) -> bytes:
    """Arguments laid out as an entry's parameter list, given as (offset, size) of each."""
    if len(params) != len(args):
        raise ValueError(f"{len(args)} arguments, the kernel has {len(params)} parameters")
    packed = bytearray(params[-1][0] + params[-1][1] if params else 0)
    for index, ((offset, size), arg) in enumerate(zip(params, args, strict=True)):
        data = _bytes(arg, size)
        if len(data) != size:
            raise ValueError(f"argument {index} has {len(data)} bytes, the parameter has {size}")
        packed[offset : offset + size] = data
    return bytes(packed)


def _bytes(arg, size: int) -> bytes:
    if isinstance(arg, torch.Tensor):
        return struct.pack("<Q", arg.data_ptr())
    if arg is None:
        return bytes(8)
    if isinstance(arg, int):
        kind = _INTS[size]
        return struct.pack("<" + (kind.upper() if arg >= 1 << (8 * size - 1) else kind), arg)
    if isinstance(arg, float):
        if size not in _FLOATS:
            raise ValueError(f"a float for a parameter of {size} bytes: pass bytes")
        return struct.pack("<" + _FLOATS[size], arg)
    if isinstance(arg, TensorMap):
        return arg.encode()
    if hasattr(arg, "tobytes"):
        return arg.tobytes()
    if isinstance(arg, bytes | bytearray | ctypes.Structure):
        return bytes(arg)
    raise TypeError(f"an argument of type {type(arg).__name__} cannot be passed to a kernel")
