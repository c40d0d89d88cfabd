"""`llmkernels check`: the parity battery on the user's own machine, optionally on shapes the user names."""

import argparse
import itertools

import torch
from rich.progress import track
from rich.table import Table

from llmkernels import ops, registry
from llmkernels.cli import UsageError
from llmkernels.cli.console import make_console
from llmkernels.testing.battery import judge

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 0:
        raise argparse.ArgumentTypeError(f"shape {text!r}, expected sizes like 4096x1024")
    return shape


def add_arguments(parser) -> None:
    parser.add_argument("op", nargs="?", help="one op; default: all")
    parser.add_argument("--shape", type=_shape, action="append", help="e.g. 4096x1024; may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, help="default: all")
    parser.add_argument("--backend", choices=registry.BACKENDS, help="default: all that run here")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


def _selected(args) -> list:
    """(cases module, case) for every case asked for."""
    known = ops.with_cases()
    if args.op is not None and args.op not in known:
        raise UsageError(f"unknown op {args.op!r}, expected one of {', '.join(known)}")
    if args.device not in ("cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"device {args.device!r} is not there")
    chosen = []
    for cases in itertools.chain.from_iterable(map(ops.all_cases, ops.FAMILIES)):
        for case in cases.test_cases():
            if args.op in (None, case.op) and args.dtype in (None, _name(case.dtype)):
                chosen.append((cases, case))
    if args.shape:
        plain = {(case.op, case.dtype): (cases, case) for cases, case in reversed(chosen) if case.data == "normal"}
        chosen = [(cases, cases.reshaped(case, shape)) for shape in args.shape for cases, case in plain.values()]
    return chosen


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def run(args) -> int:
    console = make_console()
    chosen = _selected(args)
    backends = (args.backend,) if args.backend else registry.BACKENDS
    worst: dict[tuple[str, str, str], list] = {}
    refused: dict[tuple[str, str], str] = {}
    failures = []
    for cases, case in track(chosen, "checking", console=console, transient=True):
        for backend in backends:
            try:
                results = judge(cases, case, backend, args.device)
            except registry.NoBackendError as error:
                refused.setdefault((case.op, backend), str(error).rsplit("cannot run this call: ", 1)[-1])
                continue
            for name, difference in results.items():
                row = worst.setdefault((case.op, backend, _name(case.dtype)), [0, 0.0, 0.0, "ok"])
                row[0] += 1
                row[1], row[2] = max(row[1], difference.max_error), max(row[2], difference.baseline_error)
                if difference.message:
                    row[3] = "FAIL"
                    failures.append(f"{case} on {backend}: {name}: {difference.message}")
    table = Table(title="results against fp64 truth, judged row by row by the error of plain PyTorch")
    for column in ("op", "backend", "dtype", "results", "largest error", "PyTorch's", ""):
        table.add_column(column)
    for (op, backend, dtype), (count, error, baseline, verdict) in sorted(worst.items()):
        table.add_row(op, backend, dtype, str(count), f"{error:.1e}", f"{baseline:.1e}", verdict)
    for (op, backend), reason in sorted(refused.items()):
        table.add_row(op, backend, "", "", "", "", f"not run: {reason}")
    console.print(table)
    for failure in failures:
        console.print(failure, markup=False)
    if args.backend and not worst:
        raise UsageError(f"backend {args.backend!r} ran none of the {len(chosen)} cases: {'; '.join(refused.values())}")
    return 1 if failures else 0
