"""Compiles Triton kernels for GPUs that are not here: one line of JSON in, one line out. See triton_sim.py."""

import importlib
import json
import sys
import traceback

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor


class Pointer:
    """What specialisation asks a tensor for."""

    def __init__(self, dtype: str, aligned: bool):
        self.dtype = getattr(torch, dtype)
        self._address = 0 if aligned else 1

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return 0


_LANGUAGE_NAMES = {"fp32": "float32", "fp64": "float64", "fp16": "float16", "bf16": "bfloat16"}


def _argument(described):
    """What triton_sim described: a pointer, a descriptor, a dtype of the language, or a plain value."""
    if not isinstance(described, dict):
        return described
    if "block" in described:
        return TensorDescriptor(
            Pointer(described["pointer"], True), *(described[x] for x in ("shape", "strides", "block"))
        )
    if "dtype" in described:
        return getattr(tl, _LANGUAGE_NAMES.get(described["dtype"], described["dtype"]))
    return Pointer(described["pointer"], described["aligned"])


def compile_request(module: str, name: str, args: list, kwargs: dict, capability: int) -> dict:
    """Specialise and compile as `kernel[grid](*args, **kwargs)` would on a GPU of this capability."""
    function = getattr(importlib.import_module(module), name)
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(function.signature, function.params, backend)
    args, kwargs = [_argument(arg) for arg in args], {name: _argument(arg) for name, arg in kwargs.items()}
    bound, specialization, _ = bind(*args, **kwargs)
    options, signature, constexprs, attrs = function._pack_args(backend, kwargs, bound, specialization, None)
    source = ASTSource(function, signature, constexprs, attrs)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    metadata = compiled.metadata
    return {
        "ptx": compiled.asm["ptx"],
        "kernel": metadata.name,
        "names": function.arg_names,
        "passed": [name for name, kind in signature.items() if kind != "constexpr"],
        "warps": metadata.num_warps,
        "shared": metadata.shared,
        "cluster": list(metadata.cluster_dims) if hasattr(metadata, "cluster_dims") else [metadata.num_ctas, 1, 1],
        "scratch_bytes": metadata.global_scratch_size,
        "descriptors": getattr(metadata, "tensordesc_meta", None),
    }


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # what the compiler prints must not be taken for an answer
    for line in sys.stdin:
        try:
            answer = compile_request(*json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
