"""What a compiled CUDA binary uses of a GPU, by the cuobjdump that comes with Triton; and names of kernels to read."""

import importlib.util
import re
import subprocess
from pathlib import Path

_TRITON = importlib.util.find_spec("triton")
# None without Triton.
CUOBJDUMP = Path(_TRITON.origin).parent / "backends/nvidia/bin/cuobjdump" if _TRITON else None


def usage(binary: str | Path) -> dict[str, dict[str, int]]:
    """Mangled kernel -> its REG (registers a thread), STACK, SHARED and LOCAL (bytes). STACK and LOCAL mean spills."""
    command = [CUOBJDUMP, "--dump-resource-usage", binary]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        name: {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        for name, line in re.findall(r"Function (\S+):\s+(REG:.*)", text)
    }


def short_name(kernel: str) -> str:
    """A demangled name without result, parameters and namespaces; enumerators as their numbers."""
    name = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\((?:\w+::)*\w+\)(?=-?\d)", "", name)  # casts of enumerators: (Kind)0 -> 0
    return re.sub(r"\w+::", "", name.partition("(")[0])
