"""Time the softmax family alone: `python benchmarks/ops/bench_softmax.py [--threads 1] [--json out.json]`.

What is timed is declared in llmkernels/ops/softmax/bench.py, which an installed package has too.
"""

import sys

from llmkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--family", "softmax", *sys.argv[1:]]))
