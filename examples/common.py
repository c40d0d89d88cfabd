"""What the examples share: arguments, text, training side by side, measurements, tables, pictures.

An example is a function `run(args, console)` that builds a model and asks a `Study` of it: the same model is trained
and measured three times, in turns, on the same data: in plain PyTorch, with llmkernels, and in plain PyTorch rounded
otherwise, whose distance from the first says how far two correct runs may be apart.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import llmkernels
from llmkernels import machine
from llmkernels.benchmarking.memory import peak_memory
from llmkernels.benchmarking.timer import interleave
from llmkernels.cli import UsageError
from llmkernels.cli.console import make_console
from llmkernels.demo.train import agreement

VARIES = "the peak that the system reports varies by a tenth from run to run"
RESULTS = Path(__file__).parent / "results"
PLAIN, FAST, OTHER = "PyTorch", "llmkernels", "PyTorch, rounded otherwise"


def main(run: Callable, description: str, *, steps: int, add_arguments: Callable | None = None) -> int:
    """Parse the arguments that every example has and call `run(args, console)`; the exit status of the process."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=steps, help=f"training steps (default {steps})")
    parser.add_argument("--text", type=Path, help="a file to learn from; default: Python's standard library")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the picture")
    if add_arguments is not None:
        add_arguments(parser)
    args = parser.parse_args()
    try:
        if args.steps < 4:
            raise UsageError(f"--steps is {args.steps}, expected at least 4")
        if args.threads < 1:
            raise UsageError(f"--threads is {args.threads}, expected at least 1")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: no CUDA device")
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out: cannot write to {args.out}: {error.strerror}") from error
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        return run(args, make_console())
    except UsageError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2


@dataclass
class Run:
    """One copy of the model in training. `memory` is the example's own, for state that goes from batch to batch."""

    name: str
    model: nn.Module
    threads: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A line of the table. `slower` says why `fast` is behind, and counts where it is."""

    name: str
    unit: str
    plain: float
    fast: float
    ratio: float | None = None  # times faster, or times smaller; None where it is not about speed or size
    slower: str | None = None


class Study:
    """A model in plain PyTorch (`plain`) and with llmkernels (`fast`), and what was measured of both.

    Args:
        name: of the example: the JSON and the picture are called so.
        model: in plain PyTorch.
        prepare: makes a copy of the model fast and returns what is to be printed; by default `llmkernels.accelerate`.
    """

    def __init__(self, name: str, args: argparse.Namespace, console: Console, model: nn.Module,
                 prepare: Callable[[nn.Module], Any] = llmkernels.accelerate):  # fmt: skip
        self.name, self.args, self.console = name, args, console
        other = 1 if args.threads > 1 else 2
        copies = [(PLAIN, args.threads), (FAST, args.threads), (OTHER, other)]
        self.runs = [Run(label, copy.deepcopy(model), threads) for label, threads in copies]
        self.plain, self.fast = (run.model for run in self.runs[:2])
        _round_otherwise(self.runs[2].model)
        console.rule(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {args.threads} threads")
        self.report = prepare(self.fast)
        console.print(self.report)
        self.rows: list[Row] = []
        self.agreement: dict | None = None
        self.facts: dict[str, Any] = {}

    def train(self, batch: Callable[[int], tuple[Tensor, ...]], loss: Callable[..., Tensor], *, items: int, unit: str,
              rate: float = 1e-3, slower: str | None = None) -> None:  # fmt: skip
        """`args.steps` steps of AdamW on `loss(run, *batch(step))`. A batch has so many `items`, of which speed is so
        many `unit` a second."""
        steps, device = self.args.steps, self.args.device
        optimizers = [torch.optim.AdamW(run.model.parameters(), lr=rate, weight_decay=0.01) for run in self.runs]
        columns = (
            TextColumn("training, in turns"), BarColumn(), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("", total=steps, loss=math.nan)
            for step in range(steps):
                tensors = tuple(tensor.to(device) for tensor in batch(step))
                scale = min(1.0, (step + 1) / 20) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
                for index in range(len(self.runs)):  # in turns, so that none always starts with cold caches
                    place = (index + step) % len(self.runs)
                    _step(self.runs[place], optimizers[place], tensors, loss, rate * scale, self.args.seed + step)
                progress.update(task, advance=1, loss=self.runs[1].losses[-1])
        torch.set_num_threads(self.args.threads)
        plain, fast, other = self.runs
        self.agreement = asdict(agreement(plain.losses, fast.losses, other.losses))
        warm = slice(min(3, steps - 1), None)
        ratio = statistics.median(a / b for a, b in zip(plain.seconds[warm], fast.seconds[warm], strict=True))
        speeds = (items / statistics.median(run.seconds[warm]) for run in (plain, fast))
        self.rows.append(Row("training", f"{unit} per second", *speeds, ratio, slower))
        self.rows.append(Row("last training loss", "nats", plain.losses[-1], fast.losses[-1]))
        tensors = tuple(tensor.to(device) for tensor in batch(steps))
        self.memory("memory of a training step", lambda run: loss(run, *tensors).backward(), VARIES)

    def undone(self) -> nn.Module:
        """The weights of the fast model in plain PyTorch: two trainings drift apart, the same weights must not."""
        model = copy.deepcopy(self.fast)
        llmkernels.restore(model)
        return model.eval()

    def value(self, name: str, unit: str, function: Callable[[nn.Module], float]) -> tuple[float, float]:
        """A number of each model, such as an accuracy."""
        with torch.no_grad():
            found = tuple(float(function(run.model.eval())) for run in self.runs[:2])
        self.rows.append(Row(name, unit, *found))
        return found

    def compare(self, name: str, unit: str, plain: float, fast: float, *, smaller: bool = False) -> None:
        """Two numbers that were had elsewhere; with `smaller` how many times smaller the second is counts."""
        self.rows.append(Row(name, unit, plain, fast, plain / fast if smaller else None))

    def time(self, name: str, unit: str, items: int, plain: Callable[[], Any], fast: Callable[[], Any], *,
             slower: str | None = None) -> None:  # fmt: skip
        """`items` of `unit` a second by two functions, in turns."""
        with torch.no_grad():
            seconds = interleave({PLAIN: plain, FAST: fast}, self.args.device, seconds=2.0)
        ratio = statistics.median(a / b for a, b in zip(seconds[PLAIN], seconds[FAST], strict=True))
        speeds = (items / statistics.median(seconds[name]) for name in (PLAIN, FAST))
        self.rows.append(Row(name, f"{unit} per second", *speeds, ratio, slower))

    def memory(self, name: str, function: Callable[[Run], Any], slower: str | None = None) -> None:
        """The least peak of memory, beyond what was there before, of three calls after a first one."""
        sizes = []
        for run in self.runs[:2]:
            function(run)
            peaks = [peak_memory(lambda run=run: function(run), self.args.device) for _ in range(3)]
            sizes.append(min(peaks) / 2**20)
        ratio = sizes[0] / sizes[1] if min(sizes) > 0 else None
        self.rows.append(Row(name, "MB", *sizes, ratio, slower))

    def finish(self) -> int:
        """Print the table, write JSON and picture; the exit status: 0 if the loss curves agree."""
        table = Table(title=f"{self.name}, {self.args.threads} threads")
        for column in ("", PLAIN, FAST, "", ""):
            table.add_column(column, justify="left" if not column else "right")
        for row in self.rows:
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
            slower = row.slower or "" if row.ratio is not None and row.ratio < 1.0 else ""
            table.add_row(f"{row.name} ({row.unit})", number(row.plain), number(row.fast), ratio, slower)
        self.console.print(table)
        verdict = self.agreement
        if verdict is not None:
            word = "agree" if verdict["agrees"] else "DO NOT AGREE"
            self.console.print(
                f"loss curves {word}: apart by {verdict['difference']:.1e} at most, allowed {verdict['allowed']:.1e} "
                f"(two runs of PyTorch that are rounded differently: {verdict['spread']:.1e})"
            )
        config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.args).items()}
        config["text"] = "the standard library" if self.args.text is None else self.args.text.name
        del config["out"]
        document = {
            "name": self.name, "machine": machine.facts(), "config": config, "rows": [asdict(row) for row in self.rows],
            "agreement": verdict, "losses": {run.name: run.losses for run in self.runs}, "facts": self.facts,
            "report": self.report.to_dict() if hasattr(self.report, "to_dict") else str(self.report),
        }  # fmt: skip
        path = self.args.out / f"{self.name}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        draw(document, path.with_suffix(".png"))
        self.console.print(f"written: {path}, {path.with_suffix('.png')}")
        return 0 if verdict is None or verdict["agrees"] else 1


@torch.no_grad()
def _round_otherwise(model: nn.Module) -> None:
    """Move each weight by a unit in the last place at most, as another order of the same sums would.

    Another number of threads alone is not enough: many of torch's functions give the same bits on any number.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.rand(parameter.shape, generator=generator).mul_(2.0).sub_(1.0).to(parameter.device)
        parameter.mul_(1.0 + torch.finfo(parameter.dtype).eps * noise)


def _step(run: Run, optimizer, tensors: tuple[Tensor, ...], loss: Callable, rate: float, seed: int) -> None:
    torch.set_num_threads(run.threads)
    torch.manual_seed(seed)  # every run draws the same dropout
    for group in optimizer.param_groups:
        group["lr"] = rate
    run.model.train()
    begin = time.perf_counter()
    found = loss(run, *tensors)
    optimizer.zero_grad(set_to_none=True)
    found.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    optimizer.step()
    run.losses.append(found.item())  # also waits for a GPU
    run.seconds.append(time.perf_counter() - begin)


def size(model: nn.Module) -> float:
    """MB of parameters and buffers."""
    return sum(part.nbytes for part in (*model.parameters(), *model.buffers())) / 2**20


def number(value: float) -> str:
    """A number as a table has it: three digits and more."""
    if abs(value) >= 1000.0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10.0 else f"{value:.4f}"


def draw(document: dict, path: Path) -> None:
    """The loss curves, and how many times faster or smaller."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, bars) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2), layout="constrained")
    styles = {PLAIN: ("#777777", 4, 0.5), FAST: ("#d62728", 1.2, 1.0)}
    for name, (color, width, alpha) in styles.items():
        losses = document["losses"][name]
        curves.plot(range(1, len(losses) + 1), losses, color=color, linewidth=width, alpha=alpha, label=name)
    curves.set(xlabel="step", ylabel="training loss (nats)", title=f"{document['name']}: same seed, same data")
    curves.legend()
    rows = [row for row in document["rows"] if row["ratio"] is not None]
    drawn = bars.barh([row["name"] for row in rows], [row["ratio"] for row in rows], color="#d62728")
    bars.bar_label(drawn, fmt="%.2fx")
    bars.axvline(1.0, color="black", linestyle=":")
    bars.invert_yaxis()
    bars.set(title="times faster, or smaller")
    figure.savefig(path, dpi=100)
    plt.close(figure)
