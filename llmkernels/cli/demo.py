"""`llmkernels demo`: train small language models on real text, in eager PyTorch and after `accelerate(model)`.

A Transformer and an LSTM, each on the same bytes, judged alike.
"""

import copy
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import llmkernels
from llmkernels import machine
from llmkernels.cli import UsageError
from llmkernels.cli.console import make_console
from llmkernels.demo import text as source
from llmkernels.demo.model import LanguageModel, LSTMLanguageModel
from llmkernels.demo.picture import draw
from llmkernels.demo.train import Run, agreement, bits_per_byte, lockstep


def add_arguments(parser) -> None:
    parser.add_argument("--text", type=Path, help="train on this file; default: Python's standard library")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for demo.json and demo.png")
    parser.add_argument("--steps", type=int, help="training steps of each model (default 80)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads of the measured runs (default: all cores)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model for a few seconds: shows that it works")


def _prepare(args) -> None:
    if args.steps is not None and args.steps < 2:
        raise UsageError(f"--steps is {args.steps}, expected at least 2")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads is {args.threads}, expected at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "demo.json").touch()
    except OSError as error:
        raise UsageError(f"--out: cannot write to {args.out}: {error.strerror}") from error


def run(args) -> int:
    console = make_console()
    _prepare(args)
    train, held_out = source.split(source.read(args.text))
    size, length = (4, 64) if args.quick else (8, 256)
    steps = args.steps or (8 if args.quick else 80)
    threads = args.threads or torch.get_num_threads()
    config = {"steps": steps, "batch": size, "length": length, "threads": threads, "seed": args.seed,
              "device": args.device, "text": str(args.text or "standard library")}  # fmt: skip
    console.print(f"{len(train):,} bytes to train on, {len(held_out):,} held out")
    makers = {
        "Transformer": lambda: LanguageModel(64, 2, 4, length) if args.quick else LanguageModel(length=length),
        "LSTM": lambda: LSTMLanguageModel(64) if args.quick else LSTMLanguageModel(),
    }
    parts = {}
    for name, make in makers.items():
        torch.manual_seed(args.seed)
        parts[name] = _part(console, name, make().to(args.device), (train, held_out), config, args.quick)
    result = {"machine": machine.facts(), "config": config, "models": parts}
    (args.out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.out / "demo.png")
    console.print(f"\nwritten: {args.out / 'demo.json'}, {args.out / 'demo.png'}")
    good = all(part["agreement"]["agrees"] and part["restored"]["same_objects"] for part in parts.values())
    return 0 if good else 1


def _part(console: Console, title: str, model: nn.Module, data: tuple[Tensor, Tensor], config: dict,
          quick: bool) -> dict:  # fmt: skip
    """Train `model` in eager PyTorch and after accelerate(), print what came of it and return it for the JSON."""
    (train, held_out), device, seed = data, config["device"], config["seed"]
    steps, size, length, threads = (config[name] for name in ("steps", "batch", "length", "threads"))
    eager, other, fast = model, copy.deepcopy(model), copy.deepcopy(model)
    objects = [(id(module), type(module)) for module in fast.modules()]
    report = llmkernels.accelerate(fast)
    console.rule(f"{title}: {sum(p.numel() for p in model.parameters()):,} parameters")
    console.print(report)
    note = None
    if not report.swapped:
        note = "nothing was swapped, so before and after are the same program: any difference in speed is noise"
        console.print(note)

    runs = [
        Run("eager", eager, threads),
        Run("accelerated", fast, threads),
        Run("eager, other order", other, threads, reverse=True),
    ]
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        "loss {task.fields[loss]:.3f}",
        TimeRemainingColumn(),
    )
    columns = tuple(TextColumn(column) if isinstance(column, str) else column for column in columns)
    begin = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training, in turns", total=steps, loss=0.0)
        for _ in lockstep(runs, train, steps, size, length, seed, device):
            progress.update(task, advance=1, loss=runs[1].losses[-1])
    seconds = time.perf_counter() - begin
    torch.set_num_threads(threads)

    verdict = agreement(*(run.losses for run in runs))
    warm = slice(min(3, steps - 1), None)
    ratios = sorted(a / b for a, b in zip(runs[0].seconds[warm], runs[1].seconds[warm], strict=True))
    speedup = {
        "median": statistics.median(ratios),
        "p10": ratios[len(ratios) // 10],
        "p90": ratios[-1 - len(ratios) // 10],
    }
    bits = {run.name: bits_per_byte(run.model, held_out, size, length, 4 if quick else 16, device) for run in runs[:2]}
    speeds = {run.name: size * length / statistics.median(run.seconds[warm]) for run in runs[:2]}
    restored = llmkernels.restore(fast)
    same = [(id(module), type(module)) for module in fast.modules()] == objects
    part = {
        "report": report.to_dict(),
        "note": note,
        "losses": {run.name: run.losses for run in runs},
        "agreement": verdict.__dict__,
        "tokens_per_second": speeds,
        "speedup": speedup,
        "bits_per_byte": bits,
        "restored": {"modules": restored, "same_objects": same},
        "seconds": seconds,
    }
    _print(console, part, f"{title}, {threads} threads, {steps} steps")
    sample = fast.sample(b"import ", 40 if quick else 160, torch.Generator().manual_seed(seed))
    console.print("\nthe model, asked to continue 'import ':", style="bold")
    console.print(sample.decode("utf-8", "replace"), markup=False, highlight=False)
    return part


def _print(console: Console, part: dict, title: str) -> None:
    table = Table(title=title)
    for column in ("", "eager", "accelerated"):
        table.add_column(column, justify="left" if not column else "right")
    speeds, bits, losses = part["tokens_per_second"], part["bits_per_byte"], part["losses"]
    names = ("eager", "accelerated")
    table.add_row("tokens per second (median step)", *(f"{speeds[name]:,.0f}" for name in names))
    table.add_row("last training loss (nats per byte)", *(f"{losses[name][-1]:.5f}" for name in names))
    table.add_row("held-out loss (bits per byte)", *(f"{bits[name]:.4f}" for name in names))
    console.print(table)
    speedup, verdict = part["speedup"], part["agreement"]
    console.print(
        f"speed-up, step by step: {speedup['median']:.2f}x (p10 {speedup['p10']:.2f}, p90 {speedup['p90']:.2f})"
    )
    word = "agree" if verdict["agrees"] else "DO NOT AGREE"
    console.print(
        f"loss curves {word}: apart by {verdict['difference']:.1e} at most, allowed {verdict['allowed']:.1e} "
        f"(two eager runs with the rows of a batch in another order: {verdict['spread']:.1e})"
    )
    restored = part["restored"]
    state = "the same objects as before" if restored["same_objects"] else "NOT the same objects"
    console.print(f"restore(model): {restored['modules']} modules restored, {state}")
