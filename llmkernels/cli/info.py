"""`llmkernels info`: what is built, what runs here, and why anything is absent."""

import importlib.util
import json

import torch

import llmkernels
from llmkernels import _native, machine, registry


def add_arguments(parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _gather() -> dict:
    cpu, cuda = _native.module("cpu"), _native.module("cuda")
    triton = importlib.util.find_spec("triton")
    return {
        "machine": machine.facts(),
        "backends": {name: reason or "present" for name, reason in llmkernels.backends().items()},
        "cpu": {**cpu.build_info(), "runs here": cpu.available_isas()} if cpu else None,
        "cuda": cuda.build_info() if cuda else None,
        "triton": None if triton is None else importlib.import_module("triton").__version__,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "ops": list(registry.ops()),
    }


def run(args) -> int:
    gathered = _gather()
    if args.json:
        print(json.dumps(gathered, indent=1))
        return 0
    for name, value in gathered.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, item in value.items():
                print(f"  {key:<12} {', '.join(item) if isinstance(item, list) else item}")
        else:
            print(f"{name}: {', '.join(value) if isinstance(value, list) else value or 'none'}")
    return 0
