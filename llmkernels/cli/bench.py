"""`llmkernels bench [OP]`: ops beside their peers; no time is printed for a wrong answer."""

import dataclasses
import json
import re
from pathlib import Path

import torch
from rich.progress import track
from rich.table import Table

from llmkernels import machine, ops, registry
from llmkernels.benchmarking import runner
from llmkernels.benchmarking.timer import keep_freed_memory
from llmkernels.cli import UsageError
from llmkernels.cli.console import make_console


def add_arguments(parser) -> None:
    parser.add_argument("op", nargs="?", help="one op; default: all")
    parser.add_argument("--family", choices=ops.FAMILIES, help="all ops of one family")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default 1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--backend", choices=registry.BACKENDS, help="one of ours beside the peers; default: all")
    parser.add_argument("--filter", metavar="REGEX", help="only what it is found in, of 'case mode' as in the table")
    parser.add_argument("--full", action="store_true", help="more shapes")
    parser.add_argument("--cold", action="store_true", help="inputs rotated so that none is in a cache")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each case and mode (default 3)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=Path, help="write the measurements, and a chart beside them (.png)")


def run(args) -> int:
    known = ops.with_cases()
    if args.op is not None and args.op not in known:
        raise UsageError(f"unknown op {args.op!r}, expected one of {', '.join(known)}")
    if args.threads < 1:
        raise UsageError(f"--threads is {args.threads}, expected at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device")
    if args.json is not None and not args.json.parent.is_dir():
        raise UsageError(f"--json: no folder {args.json.parent}")
    try:
        pattern = None if args.filter is None else re.compile(args.filter)
    except re.error as error:
        raise UsageError(f"--filter {args.filter!r} is no regular expression: {error}") from None
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    console = make_console()
    work = runner.plan(runner.families(args.op, args.family), full=args.full, dtype=args.dtype,
                       pattern=pattern)  # fmt: skip
    if not work:
        raise UsageError(f"{args.op or 'no op'} has no case to time with these arguments")
    settings = {"seconds": args.seconds, "compiled": not args.no_compile, "cold": args.cold, "backend": args.backend}
    try:
        results = [
            runner.measure(*item, args.device, **settings)
            for item in track(work, "measuring", console=console, transient=True)
        ]
    except registry.NoBackendError as error:
        raise UsageError(f"--backend {args.backend}: {error}") from None
    console.print(_table(results, args.threads))
    wrong = [f"{result.case} on {name}: {why}" for result in results for name, why in result.wrong.items()]
    for line in wrong:
        console.print(f"no time, wrong answer: {line}", markup=False)
    if args.json is not None:
        facts = machine.facts() | {"threads": args.threads, "device": args.device, "cold": args.cold}
        document = {"machine": facts, "results": [dataclasses.asdict(result) for result in results]}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
        from llmkernels.benchmarking.chart import draw

        where = facts["gpu"] if args.device == "cuda" else f"{facts['cpu']} ({facts['isa']}), {args.threads} thread(s)"
        draw(results, f"{where}, torch {facts['torch']}", args.json.with_suffix(".png"))
        console.print(f"written: {args.json}, {args.json.with_suffix('.png')}")
    return 1 if wrong else 0


def _table(results: list, threads: int) -> Table:
    table = Table(title=f"{threads} thread(s); median (p10 to p90); ratio to the best peer round by round")
    for column in ("case", "mode", "candidate", "time", "GB/s", "of copy", "GFLOP/s", "ratio"):
        table.add_column(column, justify="left" if column in ("case", "mode", "candidate") else "right")
    for result in results:
        for index, (name, times) in enumerate(result.candidates.items()):
            unit, factor = ("us", 1e3) if result.mode == "call" else ("ms", 1.0)
            of_copy, rate = result.of_copy(name), result.rate(name)
            time = " ".join(f"{times[key] * factor:.2f}" for key in ("median",))
            spread = f"({times['p10'] * factor:.2f} to {times['p90'] * factor:.2f})"
            table.add_row(
                result.case if index == 0 else "",
                result.mode if index == 0 else "",
                name,
                f"{time} {unit} {spread}",
                "" if result.mode == "call" else f"{result.bandwidth(name):.1f}",
                "" if of_copy is None else f"{of_copy:.0%}",
                "" if rate is None else f"{rate:.0f}",
                f"{result.ratios[name]:.2f}x"
                if name in result.ratios
                else ("best peer" if name == result.best_peer else ""),
            )
        table.add_section()
    return table
