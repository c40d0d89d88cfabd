"""What kernels of the library do on the benchmarks' cases, made small, by count: `python -m tests.ptxsim.report [op]`.

No GPU is needed and the numbers are exact: warp instructions; 32-byte sectors a request to global memory touches (4 are
perfect for 4-byte accesses of a warp, 16 for 16-byte ones); wavefronts a request to shared memory takes (1 for up to
4-byte accesses, 2 or 4 for 8 or 16 bytes, without bank conflicts).
"""

import argparse
import collections
import sys
import warnings

from llmkernels import NoBackendError, ops
from llmkernels.testing.battery import evaluate
from llmkernels.testing.resources import short_name
from tests.ptxsim import backend as simulated
from tests.ptxsim import sim

COUNTED = ("warp_instructions", "global_requests", "global_sectors", "shared_requests", "shared_wavefronts")
ELEMENTS = 16_384  # of a tensor: the benchmarks' cases are cut to about these


def count(backend: str, op: str | None) -> tuple[dict[str, collections.Counter], list[str]]:
    """Kernel -> sums over the small cases, forward and backward; and what the backend refused, a sentence each."""
    sums, refused = collections.defaultdict(collections.Counter), []
    families = [(cases, ops.bench_of(family)) for family in ops.FAMILIES for cases in ops.all_cases(family)]
    chosen = [(cases, bench, name) for cases, bench in families for name in cases.OPS if op in (None, name)]
    for cases, bench, name in chosen:
        for case in bench.bench_cases(name, full=True):
            case = bench.small(case, ELEMENTS)
            with sim.device(record=True, check=False, multiprocessors=132) as launches:
                try:
                    evaluate(cases, case, cases.make_inputs(case), backend)
                except NoBackendError as error:
                    refused.append(f"{case}: {error}")
            for launch in launches.all:
                counts = {"launches": 1} | {counter: launch[counter] for counter in COUNTED}
                sums[short_name(launch["kernel"])] += collections.Counter(counts)
    return sums, refused


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
    sums, refused = count(args.backend, args.op)
    width = max(map(len, (args.backend, *sums)))
    print(f"{args.backend:<{width}}  launches  instructions  sectors/request  wavefronts/request")
    for kernel, row in sorted(sums.items()):
        sectors = ratio(row, "global_sectors", "global_requests")
        wavefronts = ratio(row, "shared_wavefronts", "shared_requests")
        counts = f"{row['launches']:>8}  {row['warp_instructions']:>12}"
        print(f"{kernel:<{width}}  {counts}  {sectors:>15}  {wavefronts:>18}")
    for sentence in refused:
        print(sentence)
    return 0


if __name__ == "__main__":
    sys.exit(main())
