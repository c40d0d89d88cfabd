"""Whether a backend has the kernel of an op: an op is declared for all of them, before its kernels are written."""

import importlib.util

import torch

from llmkernels import _native, ops, registry


def missing(backend: str, op: str, family: str) -> str | None:
    """Why `backend` cannot run any call of `op`, in one sentence, or None."""
    if backend == "torch":
        return None
    if not registry.has(op, backend):
        return f"{op} has no such kernel"
    entry = registry.entry(op, backend)
    sentence = f"the kernel of {op} is not written"
    if backend == "triton" or backend.startswith("triton-"):
        module = f"{ops.__name__}.{family}.triton_kernels"
        found = importlib.util.find_spec(module) is not None
        names = [kernel.name().split("::")[1] for kernel in (entry.fwd, entry.bwd) if kernel is not None]
        return None if found and all(hasattr(importlib.import_module(module), name) for name in names) else sentence
    real = registry.entry(op, "cuda") if backend.startswith("cuda") else entry
    _native.why_absent(real.name)  # loads the module, which registers its kernels
    keys = ("CPU", "CUDA", "CompositeExplicitAutograd")
    for kernel in (real.fwd, real.bwd):
        if kernel is not None and not any(
            torch._C._dispatch_has_kernel_for_dispatch_key(kernel.name(), key) for key in keys
        ):
            return sentence
    return None
