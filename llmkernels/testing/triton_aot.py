"""Compile Triton kernels for GPUs that are not here, and read what each would use of one.

Runs as `python -m llmkernels.testing.triton_aot`, in a process without TRITON_INTERPRET: nested kernels of an
interpreted process cannot be compiled. Prints one JSON object per compiled kernel.
"""

import importlib.util
import json
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmkernels import ops
from llmkernels.testing import resources

# What is looked for in the PTX.
_WORDS = {"tf32": "tf32", "wgmma": "wgmma", "tma": "cp.async.bulk.tensor"}
# Bytes of shared memory a block may use, by compute capability.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}


def configurations():
    """(kernel, types of the arguments, constants, warps) of every family that has Triton kernels; where not every
    architecture runs it, also the compute capabilities of those that do."""
    for family in ops.FAMILIES:
        name = f"llmkernels.ops.{family}.triton_kernels"
        if importlib.util.find_spec(name) is not None:
            yield from importlib.import_module(name).configurations()


def _compile(kernel, types, constants, warps, capability):
    pointers = {"bf16", "fp16", "fp32", "fp64"}
    names = kernel.arg_names
    plain = [name for name in names if name not in constants]
    spelled = {**{kind: f"*{kind}" for kind in pointers}, "scalar": "fp32"}
    signature = {name: spelled.get(kind, kind) for name, kind in zip(plain, types, strict=True)}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in plain if signature[name][0] in "*i"}
    signature |= {name: "constexpr" for name in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def _usage(binary: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        (row,) = resources.usage(file.name).values()
    return row


def main(capabilities) -> None:
    for kernel, types, constants, warps, *only in configurations():
        for capability in (capability for capability in capabilities if not any(only) or capability in only[0]):
            compiled = _compile(kernel, types, constants, warps, capability)
            row = {
                "kernel": kernel.fn.__name__,
                "capability": capability,
                "warps": warps,
                "constants": {name: str(value) for name, value in constants.items()},
                "shared": compiled.metadata.shared,
                **{name: word in compiled.asm["ptx"] for name, word in _WORDS.items()},
                **_usage(compiled.asm["cubin"]),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or list(SHARED_LIMIT))
