"""Whole models with and without llmkernels: training and inference, items per second and memory, in turns.

    python benchmarks/models/run.py --threads 1 --json benchmarks/results/<machine>/models-1-thread.json
    python benchmarks/models/run.py --threads 2 --json benchmarks/results/<machine>/models-2-threads.json

Then `make tables` writes the table of docs/accelerate.md. About five minutes on an idle machine of two cores; BERT and
the LLaMA-style decoder need transformers and are made from configs, with random weights, as all models here. `--quick`
shows in seconds that it works. Eager PyTorch runs in fp32 and in bf16, and the better of the two is what counts.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
from pathlib import Path

import torch
from rich.progress import track
from rich.table import Table

from cases import QUICK, Case, Runner, Sizes, cases
from llmkernels import machine
from llmkernels.benchmarking.memory import peak_memory
from llmkernels.benchmarking.timer import interleave, ratio, summary
from llmkernels.cli.console import make_console

# Largest error of the outputs, relative to those of eager fp32, with which a time counts: what accelerate() asks of a
# whole model; in bf16 twice what eager bf16 has. With quantized weights and random models 0.03 (int8), 0.02 (w8a8) and
# 0.3 (int4) were seen; outputs that have nothing in common are off by 1.4.
FP32, TIMES_EAGER, QUANTIZED = 2e-4, 2.0, {"int8": 0.1, "w8a8": 0.1, "int4": 0.5}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def errors(runners: dict[str, Runner]) -> dict[str, float]:
    """Of each way's outputs, relative to the size of eager fp32's."""
    truth = runners["eager fp32"].answer()
    return {name: float((runner.answer() - truth).norm() / truth.norm()) for name, runner in runners.items()}


def allowed(name: str, error: dict[str, float]) -> float:
    scheme = name.split()[-1]
    return {"fp32": FP32, "bf16": TIMES_EAGER * error["eager bf16"]}.get(scheme) or QUANTIZED[scheme]


def bound(runner: Runner) -> float:
    """How many times faster a call could be if all but matrix products and the optimizer took no time (Amdahl)."""
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        runner.call()
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    fixed = sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS)
    fixed += sum(event.cpu_time_total for event in events if event.key.startswith("Optimizer.step"))
    return total / fixed if fixed else float("inf")


def measure(case: Case, seconds: float) -> dict:
    """One line of the table. Raises: AssertionError, a way gives something else than eager PyTorch."""
    runners = dict(case.runners())
    error = errors(runners)
    wrong = {name: value for name, value in error.items() if "eager" not in name and value > allowed(name, error)}
    assert not wrong, f"{case.model}, {case.mode}: outputs are off by {wrong} of their size"
    if case.run is not None and case.schemes:
        plain, fast = (runners[f"{way} fp32"].call() for way in ("eager", "llmkernels"))
        assert torch.equal(plain, fast), f"{case.model}, {case.mode}: greedy tokens differ in fp32"
    times = interleave({name: runner.call for name, runner in runners.items()}, "cpu", seconds, warm=1, least=5)
    memory = {name: (runner.held() + peak_memory(runner.call, "cpu")) / 2**20 for name, runner in runners.items()}
    best = min((name for name in times if name.startswith("eager")), key=lambda name: statistics.median(times[name]))
    others = [name for name in times if not name.startswith("eager")]
    return {
        "model": case.model, "mode": case.mode, "unit": case.unit, "items": case.items, "goal": case.goal,
        "candidates": {
            name: summary(taken) | {
                "per_second": case.items / statistics.median(taken), "peak_mb": memory[name], "error": error[name],
            }
            for name, taken in times.items()
        },
        "best_eager": best,
        "bound": bound(runners[best]) if case.products_stay else None,
        "ratios": {
            name: {peer: ratio(times[peer], times[name]) for peer in ("eager fp32", "eager bf16")} for name in others
        },
    }  # fmt: skip


def show(console, results: list[dict], threads: int) -> None:
    table = Table(title=f"{threads} thread(s); medians; times faster than eager PyTorch, round by round")
    for column in ("model", "mode", "", "per second", "peak MB", "x eager fp32", "x eager bf16", "error"):
        table.add_column(column, justify="left" if column in ("model", "mode", "") else "right")
    for result in results:
        for index, (name, values) in enumerate(result["candidates"].items()):
            ratios = result["ratios"].get(name, {})
            table.add_row(
                result["model"] if index == 0 else "", result["mode"] if index == 0 else "", name,
                f"{values['per_second']:,.0f} {result['unit']}", f"{values['peak_mb']:,.0f}",
                *(f"{ratios[peer]:.2f}" if ratios else "" for peer in ("eager fp32", "eager bf16")),
                f"{values['error']:.0e}" if values["error"] else "",
            )  # fmt: skip
        table.add_section()
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each line, at least 5 rounds (default 6)")
    parser.add_argument("--only", help="models whose name has this in it")
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that it works")
    parser.add_argument("--json", type=Path, help="write the measurements")
    args = parser.parse_args(arguments)
    if args.threads < 1:
        parser.error(f"--threads is {args.threads}, expected at least 1")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json: no folder {args.json.parent}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # its own lines about each profile
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    console, results = make_console(), []
    chosen = [
        case for case in cases(QUICK if args.quick else Sizes()) if (args.only or "").lower() in case.model.lower()
    ]
    if not chosen:
        parser.error(f"--only: no model has {args.only!r} in its name")
    if importlib.util.find_spec("transformers") is None:
        console.print("BERT and the LLaMA-style decoder are left out: they need transformers")
    for case in track(chosen, "measuring", console=console, transient=True, disable=not console.is_terminal):
        results.append(measure(case, args.seconds))
        line = ", ".join(f"{name} {v['per_second']:,.0f}" for name, v in results[-1]["candidates"].items())
        console.print(f"{case.model}, {case.mode}: {case.unit} per second: {line}", highlight=False)
    show(console, results, args.threads)
    if args.json is not None:
        facts = machine.facts() | {"threads": args.threads}
        document = {"table": "models", "machine": facts, "quick": args.quick, "results": results}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"written: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
