"""`make registers`: what ptxas gave every CUDA kernel of the built module, as docs/cuda-registers.md.

tests/test_build.py checks that nothing spills.
"""

import subprocess
import sys
from pathlib import Path

from llmkernels.testing import resources

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    modules = list((ROOT / "llmkernels").glob("_cuda*.so"))
    if resources.CUOBJDUMP is None or not modules:
        print("registers: needs triton, for its cuobjdump, and a build with nvcc", file=sys.stderr)
        return 1
    usage = resources.usage(modules[0])
    demangled = subprocess.run(["c++filt"], input="\n".join(usage), capture_output=True, text=True, check=True).stdout
    rows = sorted(
        zip(map(resources.short_name, demangled.splitlines()), usage.values(), strict=True), key=lambda r: r[0]
    )
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
