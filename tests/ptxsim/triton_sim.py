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
    _replace_launcher()
    before, _active.on = getattr(_active, "on", False), True
    try:
        yield
    finally:
        _active.on = before


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
    arguments = [given[name] for name in compiled["passed"]]
    # Behind the kernel's own: global scratch, and scratch of a profiler that is never on.
    arguments += [scratch, None][: len(loaded.params(compiled["kernel"])) - len(arguments)]
    threads = 32 * compiled["warps"]
    sim.run(loaded, compiled["kernel"], grid, threads, compiled["shared"], arguments, compiled["cluster"])


def _product(grid) -> int:
    return functools.reduce(lambda a, b: a * b, grid, 1)


def _describe(arg):
    """What specialisation looks at, as JSON."""
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
