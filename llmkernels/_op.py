"""Declare a kernel op once: its schema and its fake, in every namespace that implements it.

`llmkernels::<op>` picks a backend when it runs, so that exported graphs stay portable; `llmkernels_cuda::<op>`,
`llmkernels_cpu::<op>` and `llmkernels_triton::<op>` are the kernels themselves. The `torch` backend is plain
PyTorch and never an op, so that torch.compile sees through it.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

from llmkernels import _native
from llmkernels._autograd import transform_active
from llmkernels.registry import PORTABLE, Backend

KERNEL_NAMESPACES = ("cuda", "triton", "cpu")

# A Library owns its registrations: they end when it is garbage-collected, so these live as long as the package.
_libraries = {
    name: torch.library.Library(name, "FRAGMENT")
    for name in ("llmkernels", *(f"llmkernels_{backend}" for backend in (*KERNEL_NAMESPACES, "torch")))
}


def define_kernel(name: str, schema: str, fake: Callable, portable: Callable) -> None:
    """Define `name` in the portable namespace and in that of every compiled or Triton backend.

    `fake` computes shapes and dtypes; `portable` is the run-time behaviour of `llmkernels::<name>`.
    """
    for namespace, library in _libraries.items():
        if namespace == "llmkernels_torch":
            continue
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    _libraries["llmkernels"].impl(name, portable, "CompositeExplicitAutograd")


def define_own_kernel(backend: str, name: str, schema: str, fake: Callable) -> Callable:
    """Define an op that one backend alone has, beside those of `define_kernel`."""
    namespace = f"llmkernels_{backend}"
    _libraries[namespace].define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{namespace}::{name}", fake, lib=_libraries[namespace])
    return kernel(backend, name)


def define_question(backend: str, name: str, schema: str) -> Callable:
    """Define an op of one backend that computes nothing: it says what the backend's kernels would do."""
    _libraries[f"llmkernels_{backend}"].define(name + schema)
    return kernel(backend, name)


def opaque_reference(name: str, function: Callable) -> Callable:
    """Plain PyTorch as an op, for a reference that a compiler cannot trace: one that reads values of its tensors."""
    known, library = kernel("cpu", name), _libraries["llmkernels_torch"]
    library.define(str(known._schema).split("::", 1)[1], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"llmkernels_torch::{name}", lambda *args: known(*args), lib=library)
    library.impl(name, function, "CompositeExplicitAutograd")
    return kernel("torch", name)


def define_public(name: str, schema: str, function: Callable) -> None:
    """Define the differentiable `torch.ops.llmkernels.<name>`: autograd and fakes come from what `function` calls."""
    library = _libraries["llmkernels"]
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, function, "CompositeImplicitAutograd")


def kernel(backend: str, name: str) -> Callable:
    """The op `name` of one backend, as a function."""
    return getattr(getattr(torch.ops, f"llmkernels_{backend}"), name).default


def lazy_triton(module: str, names: tuple[str, ...]) -> None:
    """Register the launchers `names` of a Triton module that is imported when one of them first runs.

    Importing Triton costs 0.3 s and is not possible everywhere; `triton_why_not` guards the calls.
    """
    for name in names:

        def launch(*args, _name=name):
            return getattr(importlib.import_module(module), _name)(*args)

        for key in ("CUDA", "CPU"):
            _libraries["llmkernels_triton"].impl(name, launch, key)


# --- what every op's backends refuse ---------------------------------------------------------------------------------


# Every call asks these, most of them about CPU tensors: the common answers are constants, since formatting one takes as
# long as all the rest of the choice.


def _transform_reason() -> str | None:
    if transform_active():
        return "a torch.func transform or forward-mode AD is active, which needs plain PyTorch"
    return None


def _not_cuda(x: torch.Tensor) -> str:
    return "input is on the CPU, not on a CUDA device" if x.is_cpu else f"input is on {x.device}, not on a CUDA device"


def cuda_why_not(x: torch.Tensor, *_: torch.Tensor | None) -> str | None:
    """Why the CUDA C++ kernels cannot run on the device of `x`, or None."""
    if not x.is_cuda:
        return _not_cuda(x)
    return _native.why_absent("cuda") or _too_old(x.device) or _transform_reason()


@functools.cache
def _too_old(device: torch.device) -> str | None:
    """The kernels are compiled for compute capability 8.0 and, as PTX, for everything newer."""
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"


def cpu_why_not(x: torch.Tensor, *_: torch.Tensor | None) -> str | None:
    """Why the native CPU kernels cannot run on the device of `x`, or None."""
    if not x.is_cpu:
        return f"input is on {x.device}, not on the CPU"
    return _native.why_absent("cpu") or _transform_reason()


_TRITON_FOUND = importlib.util.find_spec("triton") is not None


def triton_absent() -> str | None:
    """None if Triton can be imported, else one sentence."""
    return None if _TRITON_FOUND else "not installed (`pip install triton`)"


def triton_why_not(x: torch.Tensor, *_: torch.Tensor | None) -> str | None:
    """Why the Triton kernels cannot run on the device of `x`, or None."""
    if x.is_cpu:
        if os.environ.get("TRITON_INTERPRET", "0") != "1":
            return "input is on the CPU, where Triton runs only under TRITON_INTERPRET=1"
    elif not x.is_cuda:
        return _not_cuda(x)
    return triton_absent() or _transform_reason()


_WHY_NOT = {"cuda": cuda_why_not, "cpu": cpu_why_not, "triton": triton_why_not}


def backends(
    op: str,
    fwd: str,
    bwd: str | None,
    reference_fwd: Callable,
    reference_bwd: Callable | None,
    *,
    refuse: dict[str, Callable] | None = None,
    ways: dict[str, Callable] | None = None,
    both: dict[str, tuple[Callable, Callable]] | None = None,
) -> list[Backend]:
    """The usual backends of `op`, best first, from the names of its kernel ops and its plain-PyTorch functions.

    Those of the backward are None where an op has none. `refuse` has for some backends a `refuses` of the op's own,
    asked where `why_not` has nothing to say; `ways` has for some what `explain` adds to "runs", `both` the kernels of
    two calls as one. `cpu` stands before `triton` only so that Triton's interpreter, far slower, is never preferred for
    CPU tensors.
    """
    own, ways, both = refuse or {}, ways or {}, both or {}
    entries = [
        Backend(
            op, name, kernel(name, fwd), bwd and kernel(name, bwd), why, own.get(name), ways.get(name), both.get(name)
        )
        for name, why in _WHY_NOT.items()
    ]
    entries.append(Backend(op, "torch", reference_fwd, reference_bwd, lambda *_: None))
    portable = (name and getattr(torch.ops.llmkernels, name).default for name in (fwd, bwd))
    return [*entries, Backend(op, PORTABLE, *portable, lambda *_: None)]
