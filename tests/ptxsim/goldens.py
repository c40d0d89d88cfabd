"""The interpreter beside a real GPU, bit by bit: `python -m tests.ptxsim.goldens --check` or `--write`.

Both run the cases of golden_cases.py on the interpreter and, where there is a GPU, on it. --check compares; without a
GPU it compares with the outputs that --write stored in goldens/, one .npz for each generation of GPUs.
"""

import argparse
import functools
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from tests.ptxsim import golden_cases, gpu, sim

FOLDER = Path(__file__).with_name("goldens")


def interpreted(case: golden_cases.Case) -> torch.Tensor:
    """The result of the interpreter; a fault is raised."""
    sim.launch(
        case.kernel, case.grid, case.block, case.smem, *case.args,
        source=golden_cases.KERNELS / case.source, arch=case.arch, cluster=case.cluster,
    )  # fmt: skip
    return case.result()


def executed(device: gpu.Gpu, case: golden_cases.Case) -> torch.Tensor:
    """The result of the GPU."""
    source = golden_cases.KERNELS / case.source
    device.launch(source, case.arch, case.kernel, case.grid, case.block, case.smem, case.args, case.cluster)
    return case.result()


@functools.cache
def stored() -> dict[str, torch.Tensor]:
    """Name of a case -> its result on a GPU, as committed."""
    found = {}
    for path in sorted(FOLDER.glob("*.npz")):
        with np.load(path) as file:
            found |= {name: torch.from_numpy(file[name]) for name in file.files}
    return found


def words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32).flatten()


def difference(case: golden_cases.Case, got: torch.Tensor, expected: torch.Tensor) -> str | None:
    """One sentence if the bits differ."""
    ours, theirs = words(got), words(expected)
    differ = ours != theirs
    if case.approximate:
        close = torch.isclose(ours.view(torch.float32), theirs.view(torch.float32), rtol=2**-10, equal_nan=True)
        differ &= ~close
    wrong = differ.nonzero().flatten()
    if len(wrong) == 0:
        return None
    bits = [tensor.numpy().view(np.uint32) for tensor in (ours, theirs)]
    shown = ", ".join(f"[{i}] {bits[0][i]:#010x} for {bits[1][i]:#010x}" for i in wrong[:3].tolist())
    return f"{case.name}: {len(wrong)} of {len(ours)} words differ: {shown}"


def compare(cases: Iterable[golden_cases.Case], expected: dict[str, torch.Tensor]) -> list[str]:
    """Sentences about the cases that do not run, and about those that differ from a GPU where its result is known."""
    wrong = []
    for case in cases:
        try:
            result = interpreted(case)
        except sim.Fault as fault:
            wrong.append(f"{case.name}: {fault}")
            continue
        if case.name in expected:
            wrong.append(difference(case, result, expected[case.name]))
    return [sentence for sentence in wrong if sentence is not None]


def run_on(device: gpu.Gpu, cases: Iterable[golden_cases.Case]) -> dict[str, torch.Tensor]:
    return {case.name: executed(device, case) for case in cases if device.runs(case.arch)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="compare the interpreter with a GPU, or with the goldens")
    mode.add_argument("--write", action="store_true", help="store what this machine's GPU computes")
    args = parser.parse_args()
    device = gpu.find()
    if device is None and args.write:
        print("no GPU: nothing can be written")
        return 1
    if (reason := sim.absent() if args.check else None if sim.nvcc() else "nvcc was not found") is not None:
        print(f"skipped: {reason}")
        return 0
    expected = stored() if device is None else run_on(device, golden_cases.cases())
    if not expected:
        print("skipped: no GPU is here, and no goldens were ever written (tests/ptxsim/goldens)")
        return 0
    where = "the goldens" if device is None else device.name
    if args.write:
        FOLDER.mkdir(exist_ok=True)
        path = FOLDER / f"sm_{device.capability[0]}{device.capability[1]}.npz"
        np.savez_compressed(path, **{name: words(tensor).numpy() for name, tensor in expected.items()})
        print(f"{path.relative_to(sim.ROOT)}: {len(expected)} results of {where}, {path.stat().st_size} bytes")
        return 0
    wrong = compare(golden_cases.cases(), expected)
    for sentence in wrong:
        print(sentence)
    print(f"{len(expected)} results of {where}: {len(wrong)} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
