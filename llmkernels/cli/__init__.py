"""`llmkernels info | check | bench | accelerate | demo`.

Each subcommand is a module with add_arguments(parser) and run(args).
"""

import argparse
import importlib
import sys

SUBCOMMANDS = {
    "info": "what is built, which instruction sets and GPUs, and why anything is absent",
    "check": "the parity battery on this machine, also on shapes you name",
    "bench": "measure ops beside their peers",
    "accelerate": "accelerate and quantize a model of a local folder of Hugging Face, and write it",
    "demo": "train a small language model on real text, before and after accelerate(model)",
}


class UsageError(Exception):
    """One sentence for the user; the command exits with status 2."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="llmkernels", description="Kernels for language models, proven and explained."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {}
    for name, description in SUBCOMMANDS.items():
        try:
            modules[name] = importlib.import_module(f"llmkernels.cli.{name}")
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("llmkernels"):
                raise
            commands.add_parser(name, help=description)
            modules[name] = error.name
            continue
        modules[name].add_arguments(commands.add_parser(name, help=description, description=description))
    args = parser.parse_args(argv)
    module = modules[args.command]
    if isinstance(module, str):
        print(f"llmkernels {args.command} needs {module}: pip install 'llmkernels[cli]'", file=sys.stderr)
        return 2
    try:
        return module.run(args)
    except UsageError as error:
        print(f"llmkernels {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
