"""`make registers`: what ptxas gave every CUDA kernel of the built module, as docs/cuda-registers.md.

Read from llmkernels/_cuda by the cuobjdump that comes with Triton. tests/test_build.py checks that nothing spills.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def usage(module: Path, cuobjdump: Path) -> list[tuple[str, dict[str, int]]]:
    """(demangled kernel, its REG, STACK, SHARED and LOCAL) in alphabetical order."""
    text = subprocess.run(
        [cuobjdump, "--dump-resource-usage", module], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"Function (\S+):\s+(REG:.*)", text)
    mangled = "\n".join(name for name, _ in found)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    numbers = [
        {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)} for _, line in found
    ]
    return sorted(zip(map(short, names), numbers, strict=True), key=lambda row: row[0])


def short(kernel: str) -> str:
    """A demangled name without result, parameters and namespaces; enumerators as their numbers."""
    name = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\((?:\w+::)*\w+\)(?=-?\d)", "", name)
    return re.sub(r"\w+::", "", name.partition("(")[0])


def main() -> int:
    triton = importlib.util.find_spec("triton")
    modules = list((ROOT / "llmkernels").glob("_cuda*.so"))
    if triton is None or not modules:
        print("registers: needs triton, for its cuobjdump, and a build with nvcc", file=sys.stderr)
        return 1
    rows = usage(modules[0], Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    spilling = sum(1 for _, row in rows if row["STACK"] or row["LOCAL"])
    lines = [
        "# What ptxas gave the CUDA kernels",
        "",
        f"Made by `make registers` (sm_80): {len(rows)} kernels, {spilling} with a stack frame or spills.",
        "",
        "| kernel | registers | bytes of shared memory |",
        "|---|---|---|",
        *(f"| `{name}` | {row['REG']} | {row['SHARED']} |" for name, row in rows),
    ]
    (ROOT / "docs/cuda-registers.md").write_text("\n".join(lines) + "\n")
    print(lines[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
