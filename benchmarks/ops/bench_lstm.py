"""Time lstm alone: `python benchmarks/ops/bench_lstm.py [--threads 1] [--json out.json]`.

What is timed is declared in llmkernels/ops/lstm/bench.py, which an installed package has too.
"""

import sys

from llmkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--family", "lstm", *sys.argv[1:]]))
