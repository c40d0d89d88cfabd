"""`llmkernels accelerate MODEL`: a model of a local folder of Hugging Face, accelerated, quantized and written."""

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import llmkernels
from llmkernels import registry
from llmkernels.cli import UsageError, page
from llmkernels.cli.console import make_console
from llmkernels.cli.prompt import Prompt
from llmkernels.nn import QuantizedLinear
from llmkernels.quantization import SCHEMES
from llmkernels.quantization.checkpoints import folders, hugging_face, load_folder, load_pretrained, save_folder
from llmkernels.quantization.model import DEFAULT_SKIP


def add_arguments(parser) -> None:
    parser.add_argument("model", type=Path, help="a local folder with a model of Hugging Face, or a config.json")
    parser.add_argument("--quantize", metavar="SCHEME", help=f"quantize the linear layers: {', '.join(SCHEMES)}")
    parser.add_argument(
        "--group-size", type=int, help="columns that share a scale; -1: the row (default: the scheme's)"
    )
    parser.add_argument("--skip", action="append", metavar="NAME", help="not quantized, may be repeated (lm_head)")
    parser.add_argument("--embeddings", action="store_true", help="quantize embeddings too")
    parser.add_argument("--out", type=Path, help="write the model there, for checkpoints.load_folder")
    parser.add_argument("--report", type=Path, help="write what was done: .html, .json or .txt")
    parser.add_argument("--dtype", help=f"{', '.join(hugging_face.DTYPES)} (default: that of the files)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it is verified")
    parser.add_argument("--backend", choices=registry.BACKENDS, help="force a backend (default: the fastest)")
    parser.add_argument("--benchmark", action="store_true", help="time each replacement, and leave out the slower ones")
    parser.add_argument("--include", action="append", metavar="GLOB", help="paths that may be swapped, may be repeated")
    parser.add_argument("--exclude", action="append", metavar="GLOB", help="paths that may not be, may be repeated")
    parser.add_argument("--prompt", metavar="TEXT", help="compare the whole model on this text, by its tokenizer")


@dataclass
class Work:
    """What is known of a run on the way: for the report."""

    args: argparse.Namespace
    model: nn.Module | None = None
    random: bool = False  # the weights
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, console, name: str) -> Iterator[None]:
        """Time a part of the work, under a bar that says how many of them are done."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        begin = time.perf_counter()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            total = 2 + bool(self.args.out)
            progress.add_task(name, total=total, completed=len(self.seconds))
            yield
        self.seconds[name] = time.perf_counter() - begin


def run(args) -> int:
    _check(args)
    console = make_console()
    work = Work(args)
    try:
        return _run(work, console)
    except (ModuleNotFoundError, FileNotFoundError, FileExistsError, ValueError, TypeError) as error:
        raise UsageError(hugging_face.first_line(error)) from error


def _check(args) -> None:
    """All that can be refused before there is work. Raises: UsageError."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing asks the network
    if not args.model.exists():
        raise UsageError(f"there is no folder {args.model}")
    if args.model.is_dir() and not (args.model / hugging_face.CONFIG).is_file():
        raise UsageError(f"{args.model} has no {hugging_face.CONFIG}, expected the folder of a model of Hugging Face")
    if args.quantize is not None and args.quantize not in SCHEMES:
        raise UsageError(f"--quantize is {args.quantize!r}, expected one of {', '.join(SCHEMES)}")
    for option in ("group_size", "skip", "embeddings"):
        if args.quantize is None and getattr(args, option):
            raise UsageError(f"--{option.replace('_', '-')} without --quantize")
    if args.dtype is not None and args.dtype not in hugging_face.DTYPES:
        raise UsageError(f"--dtype is {args.dtype!r}, expected one of {', '.join(hugging_face.DTYPES)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device")
    if args.out is not None and (args.out.is_file() or (args.out.is_dir() and any(args.out.iterdir()))):
        raise UsageError(f"--out: {args.out} is there and not empty")
    for option, path in (("--out", args.out), ("--report", args.report)):
        if path is not None:
            there = next(each for each in (path, *path.absolute().parents) if each.exists())
            if not (there.is_dir() or there == path) or not os.access(there, os.W_OK):
                raise UsageError(f"{option}: cannot write to {path}")
    if args.report is not None and args.report.suffix not in page.WRITERS:
        raise UsageError(f"--report is {args.report.name!r}, expected to end with one of {', '.join(page.WRITERS)}")
    if args.report is not None and not args.report.parent.is_dir():
        raise UsageError(f"--report: no folder {args.report.parent}")
    if args.quantize is not None:
        try:
            QuantizedLinear(0, 0, scheme=args.quantize, group_size=args.group_size)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--group-size: {error}") from error


def _run(work: Work, console) -> int:
    args = work.args
    with work.stage(console, "loading"):
        work.model = model = _load(work).to(args.device)
        prompt = None if args.prompt is None else Prompt(args.model, model, args.prompt)
    console.print(page.sentence(work), markup=False)
    with work.stage(console, "accelerating"):
        report = llmkernels.accelerate(
            model, quantize=_quantize(args), dtype=_dtype(args, model), backend=args.backend, include=args.include,
            exclude=args.exclude, benchmark=args.benchmark, example_inputs=None if prompt is None else prompt.inputs,
        )  # fmt: skip
    if report.quantization is not None and not report.quantization.quantized:
        raise UsageError(f"--quantize: the model has no linear layer that can be: {_why_not(report.quantization)}")
    console.print(report)
    disagrees = report.whole is not None and not report.swapped
    out = None if disagrees else args.out
    if out is not None:
        with work.stage(console, "writing"):
            try:
                save_folder(model, out, source=args.model, report=report)
            except OSError as error:
                raise UsageError(f"--out: cannot write to {args.out}: {error.strerror or error}") from error
    document = page.document(work, report, None if prompt is None else prompt.compare(model))
    for line in page.lines(document):
        console.print(line, markup=False)
    if args.report is not None:
        try:
            args.report.write_text(page.WRITERS[args.report.suffix](document, report))
        except OSError as error:
            raise UsageError(f"--report: cannot write {args.report}: {error.strerror}") from error
    for path in filter(None, (out, args.report)):
        console.print(f"written: {path}", markup=False)
    if disagrees and args.out is not None:
        console.print(f"not written: {args.out}, since the whole model disagrees", markup=False)
    return 1 if disagrees else 0


def _quantize(args) -> dict | None:
    """What accelerate is asked for. Nobody restores the model, so no weights are kept for that."""
    if args.quantize is None:
        return None
    skip = tuple(args.skip) if args.skip else DEFAULT_SKIP
    chosen = {"scheme": args.quantize, "group_size": args.group_size, "embeddings": args.embeddings, "skip": skip}
    return chosen | {"keep_original": False}


def _dtype(args, model: nn.Module) -> torch.dtype | None:
    """What the model is cast to, where it has another dtype by now."""
    dtype = None if args.dtype is None else hugging_face.DTYPES[args.dtype]
    return None if dtype == model.dtype else dtype


def _why_not(quantized) -> str:
    reasons = [f"{layer.path}: {layer.detail}" for layer in quantized.skipped]
    return "; ".join(reasons[:3]) or "it has none"


def _load(work: Work) -> nn.Module:
    """The model, in eval mode. Raises: UsageError, ValueError."""
    args = work.args
    dtype = None if args.dtype is None else hugging_face.DTYPES[args.dtype]
    transformers = hugging_face.transformers()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what is wrong is said in one line
    config = args.model / hugging_face.CONFIG if args.model.is_dir() else args.model
    document = hugging_face.json_of(config)
    if args.model.is_dir():
        quantized = document.get("quantization_config")
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        if folders.is_ours(args.model):
            model = load_folder(args.model, accelerated=False)
            if dtype not in (None, model.dtype):
                raise UsageError(f"--dtype is {args.dtype}, but {args.model} was written in {model.dtype}")
            return model
        if method in ("awq", "gptq"):
            made = hugging_face.make(document, dtype or hugging_face.dtype_of(document), str(config), initialised=False)
            load_pretrained(made, args.model)
            return made.to(dtype) if dtype is not None else made
        if method is not None:
            raise UsageError(f"{config}: quant_method is {method!r}, expected awq, gptq or none")
        if hugging_face.has_weights(args.model):
            return hugging_face.read(args.model, document, None)  # cast when it is accelerated
    work.random = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dtype = dtype or hugging_face.dtype_of(document)
        return hugging_face.make(document, dtype, str(config), initialised=True)
