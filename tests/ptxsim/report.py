"""What every kernel of the library does on small cases, counted by the interpreter: `python -m tests.ptxsim.report`.

No GPU is needed and the numbers are exact: warp instructions; 32-byte sectors a request to global memory touches (4 are
perfect for 4-byte accesses of a warp, 16 for 16-byte ones); wavefronts a request to shared memory takes (1 for up to
4-byte accesses, 2 or 4 for 8 or 16 bytes, without bank conflicts).
"""

import argparse
import collections
import dataclasses
import sys
import warnings

from llmkernels import ops
from llmkernels.testing.battery import evaluate
from llmkernels.testing.resources import short_name
from tests.ptxsim import backend as simulated
from tests.ptxsim import sim

COUNTED = ("warp_instructions", "global_requests", "global_sectors", "shared_requests", "shared_wavefronts")
ELEMENTS = 16_384  # of each tensor: the rows of the benchmarks' cases are reduced to these


def small_norm(case):
    rows = max(1, min(case.rows, ELEMENTS // case.cols))
    return dataclasses.replace(case, shape=(rows, case.cols))


def small_gated(case):
    rows, cols = case.shape
    return dataclasses.replace(case, shape=(max(1, min(rows, ELEMENTS // cols)), cols))


def small_attention(case):
    if case.lengths is not None:
        return dataclasses.replace(case, B=2, H=2, lengths=((100, 30), (100, 130)))
    return dataclasses.replace(case, B=1, H=2, S=160, T=160)


def small_rope(case):
    batch, heads, seq, cols = case.shape
    return dataclasses.replace(case, shape=(batch, heads, max(1, min(seq, ELEMENTS // (heads * cols))), cols))


def small_cross_entropy(case):
    *batch, classes = case.shape
    return dataclasses.replace(case, shape=(max(1, min(batch[0], ELEMENTS // classes)), classes))


# family -> the small version of one of its benchmarks' cases
SMALL = {
    "activation": small_gated,
    "attention": small_attention,
    "cross_entropy": small_cross_entropy,
    "gated": small_gated,
    "norm": small_norm,
    "rope": small_rope,
}


def count(backend: str, op: str | None) -> dict[str, collections.Counter]:
    """Kernel -> sums over the small cases, forward and backward."""
    sums = collections.defaultdict(collections.Counter)
    for family, small in SMALL.items():
        cases, bench = ops.cases_of(family), ops.bench_of(family)
        for case in (case for name in cases.OPS if op in (None, name) for case in bench.bench_cases(name, full=True)):
            case = small(case)
            with sim.device(record=True, check=False, multiprocessors=132) as launches:
                evaluate(cases, case, cases.make_inputs(case), backend)
            for launch in launches.all:
                sums[short_name(launch["kernel"])] += collections.Counter(
                    {"launches": 1} | {n: launch[n] for n in COUNTED}
                )
    return sums


def ratio(sums: collections.Counter, part: str, whole: str) -> str:
    return f"{sums[part] / sums[whole]:.2f}" if sums[whole] else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="?", help="one op; default: all")
    parser.add_argument("--backend", choices=(*simulated.CUDA, *simulated.TRITON), default="cuda-sim-sm80")
    args = parser.parse_args()
    simulated.register()
    reason = simulated.absent(args.backend)
    if reason is not None:
        print(f"nothing to report: {reason}")
        return 1
    warnings.simplefilter("ignore")  # of torch's own baseline
    sums = count(args.backend, args.op)
    width = max(map(len, sums))
    print(f"{args.backend:<{width}}  launches  instructions  sectors/request  wavefronts/request")
    for kernel, row in sorted(sums.items()):
        sectors = ratio(row, "global_sectors", "global_requests")
        wavefronts = ratio(row, "shared_wavefronts", "shared_requests")
        counts = f"{row['launches']:>8}  {row['warp_instructions']:>12}"
        print(f"{kernel:<{width}}  {counts}  {sectors:>15}  {wavefronts:>18}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
