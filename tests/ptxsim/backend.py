"""The library's CUDA and Triton kernels as backends of the tests, on CPU tensors: cuda-sim-sm80, triton-sim-sm90, ...

Each is a namespace of torch ops like those of the real backends, with their schemas and fakes; an op runs what the
`cuda` or `triton` entry of the registry runs, launcher included, on the emulated GPU. They exist only once `register`
was called, and run only where a call forces them.
"""

import functools
from collections.abc import Callable

import torch

from llmkernels import _op, registry
from llmkernels.testing.battery import evaluate
from tests.ptxsim import sim, triton_sim

CUDA = {"cuda-sim-sm80": "sm_80", "cuda-sim-sm90a": "sm_90a"}
TRITON = {"triton-sim-sm80": "sm_80", "triton-sim-sm90": "sm_90a"}

_libraries: list[torch.library.Library] = []  # a registration ends when its Library is collected


def absent(name: str) -> str | None:
    """Why a simulated backend cannot run here, or None."""
    return sim.absent() or (_op.triton_absent() if name in TRITON else None)


ELEMENTS = 200_000


def too_slow(name: str, elements: int) -> str | None:
    """Why a case of so many elements is left to real GPUs, or None. One of 500,000 takes six seconds."""
    simulated = name in CUDA or name in TRITON
    return f"{name}: more than {ELEMENTS:,} elements take too long" if simulated and elements > ELEMENTS else None


def excused(name: str) -> str | None:
    """Why this machine need not run it, or None: with nvcc it must have been built."""
    return sim.nvcc_absent() or (_op.triton_absent() if name in TRITON else None)


@functools.cache  # conftest.py is imported under two names
def register() -> None:
    """Add the simulated backends to every op that has the real one."""
    for real, simulated in (("cuda", CUDA), ("triton", TRITON)):
        for name, arch in simulated.items():
            namespace = f"llmkernels_{name.replace('-', '_')}"
            _libraries.append(library := torch.library.Library(namespace, "FRAGMENT"))
            ops: dict[torch._ops.OpOverload, Callable] = {}
            for op in registry.ops():
                entry = next((entry for entry in registry.entries(op) if entry.name == real), None)
                if entry is None:
                    continue
                for kernel in (entry.fwd, entry.bwd, *(entry.both or ())):
                    if kernel is not None and kernel not in ops:
                        ops[kernel] = _define(library, namespace, kernel, real, arch)
                why_not, way = _why_not(name), entry.way and _way(entry.way, arch)
                both = entry.both and tuple(ops[kernel] for kernel in entry.both)
                registry.register_extra(
                    registry.Backend(op, name, ops[entry.fwd], ops.get(entry.bwd), why_not, entry.refuses, way, both)
                )


def _define(library, namespace: str, kernel, real: str, arch: str) -> Callable:
    """The op of `namespace` that runs `kernel`, an op of the library, on the emulated GPU."""
    schema = kernel._schema
    name, arguments = schema.name.split("::")[1], [argument.name for argument in schema.arguments]
    library.define(str(schema).replace(schema.name, name, 1), tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{namespace}::{name}", lambda *args: kernel(*args), lib=library)

    def run(*args):
        tensors = {n: arg for n, arg in zip(arguments, args, strict=True) if isinstance(arg, torch.Tensor)}
        with sim.device(arch=arch), sim.tracking(), sim.visible(tensors):
            if real == "cuda":
                return kernel(*args)
            with triton_sim.launching():
                return kernel(*args)

    library.impl(name, run, "CPU")
    return getattr(getattr(torch.ops, namespace), name).default


def _way(ask: Callable, arch: str) -> Callable[..., str]:
    def way(*tensors) -> str:
        with sim.device(arch=arch):
            return ask(*tensors)

    return way


def _why_not(name: str) -> Callable[..., str | None]:
    reason = absent(name)  # now: torch.compile cannot trace a look at the file system

    def why_not(x, *_):
        if x.device.type != "cpu":
            return f"input is on {x.device}, not on the CPU"
        return reason or _op._transform_reason()

    return why_not


def assert_same_in_any_schedule(cases, case, name: str, async_mode: str) -> None:
    """The results of a case, bitwise, whenever asynchronous copies land and in two orders of its warps."""
    inputs = cases.make_inputs(case)
    expected = evaluate(cases, case, inputs, name)
    for seed in (1, 2):
        with sim.device(seed=seed, async_mode=async_mode, check=seed == 1):
            for result, value in evaluate(cases, case, inputs, name).items():
                assert torch.equal(value, expected[result]), result
