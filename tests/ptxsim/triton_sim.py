"""Triton kernels of the library on the emulated GPU: their own launchers, Triton's own specialisation and compiler.

The tests' process interprets Triton kernels (TRITON_INTERPRET=1), and an interpreted process cannot compile them. So a
second process without that variable, this file run as a program, answers one line of JSON with the PTX of another.
"""

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import torch

from tests.ptxsim import sim

CAPABILITY = {"sm_80": 80, "sm_90a": 90}

_active = threading.local()


@contextlib.contextmanager
def launching() -> Iterator[None]:
    """`kernel[grid](...)` in this thread compiles for the architecture of `sim.device` and runs there."""
    from llmkernels import _triton  # imports Triton, which not every machine has

    _replace_launcher()
    before, _active.on = getattr(_active, "on", False), True
    usual, _triton.has_tma = _triton.has_tma, lambda tensor: CAPABILITY[sim.module().device().arch] >= 90
    try:
        yield
    finally:
        _active.on, _triton.has_tma = before, usual


@functools.cache
def _replace_launcher() -> None:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for kind in (InterpretedFunction, JITFunction):

        def run(self, *args, grid, warmup, _usual=kind.run, **kwargs):
            if not getattr(_active, "on", False):
                return _usual(self, *args, grid=grid, warmup=warmup, **kwargs)
            return _launch(self.fn, grid, args, kwargs)

        kind.run = run


def _launch(function, grid, args, kwargs) -> None:
    """One launch: `function` is the Python function under the decorator."""
    described = [_describe(arg) for arg in args], {name: _describe(arg) for name, arg in kwargs.items()}
    arch = sim.module().device().arch
    request = json.dumps([function.__module__, function.__qualname__, *described, CAPABILITY[arch]])
    compiled = _compile(request)
    if callable(grid):
        raise TypeError(f"{function.__qualname__}: the grid is a function, which the simulated launcher does not call")
    loaded = sim.load(compiled["ptx"], f"{function.__qualname__}.ptx")
    given = dict(zip(compiled["names"], args, strict=False)) | kwargs
    scratch = torch.empty(compiled["scratch_bytes"] * _product(grid) or 1, dtype=torch.uint8)
    maps = iter(compiled["descriptors"] or ())
    arguments = [part for name in compiled["passed"] for part in _parts(given[name], maps)]
    # Behind the kernel's own: global scratch, and scratch of a profiler that is never on.
    arguments += [scratch, None][: len(loaded.params(compiled["kernel"])) - len(arguments)]
    threads = 32 * compiled["warps"]
    sim.run(loaded, compiled["kernel"], grid, threads, compiled["shared"], arguments, compiled["cluster"])


def _parts(arg, maps: Iterator[dict]) -> list:
    """What the kernel has for an argument. Of a descriptor that is a tensor map with its sizes and strides, or, where the
    GPU has none, a pointer and the same twice: Triton's driver does it so."""
    if not _is_descriptor(arg):
        return [arg]
    sizes = [*arg.shape, *arg.strides]
    made = next(maps, None)
    if made is None:
        return [arg.base, *sizes, False, False, *sizes]
    return [
        sim.TensorMap(arg.base.as_strided(arg.shape, arg.strides), tuple(made["block_size"]), made["swizzle"]),
        *sizes,
    ]


def _product(grid) -> int:
    return functools.reduce(lambda a, b: a * b, grid, 1)


def _is_descriptor(arg) -> bool:
    return type(arg).__name__ == "TensorDescriptor"


def _describe(arg):
    """What specialisation looks at, as JSON."""
    if _is_descriptor(arg):
        block = {"block": arg.block_shape, "shape": list(arg.shape), "strides": list(arg.strides)}
        return _describe(arg.base) | block
    if isinstance(arg, torch.Tensor):
        return {"pointer": str(arg.dtype).removeprefix("torch."), "aligned": arg.data_ptr() % 16 == 0}
    if hasattr(arg, "name") and type(arg).__module__ == "triton.language.core":
        return {"dtype": arg.name}
    return arg


@functools.lru_cache(maxsize=1024)
def _compile(request: str) -> dict:
    process = _compiler()
    process.stdin.write(request + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the Triton compiler of the tests ended: {request}")
    answer = json.loads(line)
    if "error" in answer:
        raise RuntimeError(f"Triton cannot compile {request}:\n{answer['error']}")
    return answer


@functools.cache
def _compiler() -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(sim.ROOT), environment.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ptxsim.triton_compiler"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=sim.ROOT,
    )  # fmt: skip
    atexit.register(process.stdin.close)
    return process
