"""Time cross entropy alone: `python benchmarks/ops/bench_cross_entropy.py [--threads 1] [--json out.json]`.

What is timed is declared in llmkernels/ops/cross_entropy/bench.py, which an installed package has too.
"""

import sys

from llmkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--family", "cross_entropy", *sys.argv[1:]]))
