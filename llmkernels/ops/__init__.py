"""One package per family of ops; the folders found here are the families that tests, checks and benchmarks run.

A family has op.py (the ops), reference.py (plain PyTorch), cases.py (what is tested), bench.py (what is timed),
forward_cases.py (the same of ops without a backward), triton_kernels.py and module.py where it has kernels in Triton
and modules.
"""

import importlib
import pkgutil
from types import ModuleType

FAMILIES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg))


def cases_of(family: str) -> ModuleType:
    """The cases module of a family."""
    return importlib.import_module(f"llmkernels.ops.{family}.cases")


def bench_of(family: str) -> ModuleType:
    """The bench module of a family."""
    return importlib.import_module(f"llmkernels.ops.{family}.bench")


def all_cases(family: str) -> list[ModuleType]:
    """The cases modules of a family: `cases`, and `forward_cases` where it has ops without a backward."""
    package = importlib.import_module(f"llmkernels.ops.{family}")
    forward = [name for _, name, _ in pkgutil.iter_modules(package.__path__) if name == "forward_cases"]
    return [cases_of(family), *(importlib.import_module(f"llmkernels.ops.{family}.{name}") for name in forward)]


def with_cases() -> list[str]:
    """The ops that `llmkernels check` and `bench` can run."""
    return [op for family in FAMILIES for cases in all_cases(family) for op in cases.OPS]
