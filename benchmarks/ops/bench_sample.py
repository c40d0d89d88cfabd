"""Time sample beside the usual sort-based PyTorch code: `python benchmarks/ops/bench_sample.py [--json F]`.

It has no gradient and no single right answer, so it is no case of `llmkernels bench`; tests/ops/test_sample.py has the
proof that what comes, and how often, is right.
"""

import argparse
import json
from pathlib import Path

import torch

from llmkernels import functional, machine
from llmkernels.benchmarking.timer import interleave, ratio, summary

VOCABULARY = 32_000
OPTIONS = (
    {"temperature": 0.8},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    {"temperature": 0.8, "min_p": 0.05},
)


def usual(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Each cut on its own, as generation loops have it."""
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < torch.topk(logits, top_k).values[..., -1:], float("-inf"))
    if top_p < 1.0:
        ordered, places = torch.sort(logits)
        cut = ordered.softmax(-1).cumsum(-1) <= 1.0 - top_p
        logits = logits.masked_fill(cut.scatter(1, places, cut), float("-inf"))
    p = logits.softmax(-1)
    if min_p:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0.0)
    return torch.multinomial(p, 1).squeeze(1)


def measure(rows: int, dtype: torch.dtype, options: dict, seconds: float) -> dict:
    """Milliseconds of both, and how many times faster ours is, round by round."""
    logits = (torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3.0).to(dtype)
    candidates = {"llmkernels": lambda: functional.sample(logits, **options), "usual": lambda: usual(logits, **options)}
    times = interleave(candidates, "cpu", seconds)
    return {
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "options": options,
        "candidates": {name: summary(values) for name, values in times.items()},
        "ratio": ratio(times["usual"], times["llmkernels"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row of the table")
    parser.add_argument("--json", type=Path, help="write the measurements")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for rows in (1, 16):
        for dtype in (torch.float32, torch.bfloat16):
            for options in OPTIONS:
                found = measure(rows, dtype, options, arguments.seconds)
                ours, theirs = (value["median"] for value in found["candidates"].values())
                case = f"{rows:>3} x {VOCABULARY} {dtype} {options}"
                print(f"{case}: {ours:.3f} ms, usual {theirs:.3f} ms, {found['ratio']:.1f}x")
                results.append(found)
    if arguments.json is not None:
        facts = machine.facts() | {"threads": arguments.threads}
        document = {"table": "sampling", "machine": facts, "vocabulary": VOCABULARY, "results": results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
