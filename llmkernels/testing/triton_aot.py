"""Compile Triton kernels for GPUs that are not here, and read what each would use of one.

Runs as `python -m llmkernels.testing.triton_aot`, in a process without TRITON_INTERPRET: nested kernels of an
interpreted process cannot be compiled. Prints one JSON object per compiled kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory a block may use, by compute capability.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}


def _norm_configurations():
    """(kernel, pointer types, other arguments, constants, warps): every block size, and every flag at least once."""
    from llmkernels.ops.norm import triton_kernels as norm

    kinds = (("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp64", "fp64"))
    lengths = (10, 600, 1500, 3000, 8192, 8193)
    for index, cols in enumerate(lengths):
        block, warps = norm.config(cols)
        data, weight = kinds[index % 4]
        acc = "fp64" if data == "fp64" else "fp32"
        shared = {"ONE_BLOCK": cols <= block, "BLOCK_COLS": block, "ACC": tl.float64 if acc == "fp64" else tl.float32}
        for rms in (False, True):
            flags = {"RMS": rms, "ADD": index % 2 == 0, "HAS_WEIGHT": True}
            types = [data, data, weight, weight, data, data, acc, acc, acc, "i64", "i64", "i32"]
            yield norm._norm_fwd_kernel, types, {**flags, "HAS_BIAS": not rms, **shared}, warps
            types = [data, data, data, weight, acc, acc, data, acc, acc, acc, "i64", "i64", "i64", "i32", "i32"]
            yield (
                norm._norm_bwd_kernel,
                types,
                {**flags, "DX": True, "DWEIGHT": True, "DBIAS": not rms, **shared},
                warps,
            )
        reduce = {"BLOCK_COLS": norm._REDUCE_COLS, "ACC": shared["ACC"]}
        yield norm._norm_reduce_kernel, [acc, weight, "i32", "i32"], reduce, 4


def _compile(kernel, types, constants, warps, capability):
    pointers = {"bf16", "fp16", "fp32", "fp64"}
    names = kernel.arg_names
    plain = [name for name in names if name not in constants]
    signature = {name: f"*{kind}" if kind in pointers else kind for name, kind in zip(plain, types, strict=True)}
    signature |= {name: "constexpr" for name in constants}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in plain}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def _usage(binary: bytes, cuobjdump: Path) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text.stdout)}


def main(capabilities) -> None:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kernel, types, constants, warps in _norm_configurations():
        for capability in capabilities:
            compiled = _compile(kernel, types, constants, warps, capability)
            row = {
                "kernel": kernel.fn.__name__,
                "capability": capability,
                "warps": warps,
                "constants": {name: str(value) for name, value in constants.items()},
                "shared": compiled.metadata.shared,
                **_usage(compiled.asm["cubin"], cuobjdump),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or list(SHARED_LIMIT))
