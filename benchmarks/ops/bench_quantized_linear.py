"""Time quantized_linear alone: `python benchmarks/ops/bench_quantized_linear.py [--threads 1] [--json out.json]`.

What is timed is declared in llmkernels/ops/quantized_linear/bench.py, which an installed package has too.
"""

import sys

from llmkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--family", "quantized_linear", *sys.argv[1:]]))
