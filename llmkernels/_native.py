"""Load the compiled modules `_cpu` and `_cuda`, and remember in one sentence why one is absent.

Importing a module registers its kernels as torch ops. A module is read only if it was built for the torch that is
running: another version would fail with an undefined symbol, or not fail and be wrong.
"""

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import torch

_DIRECTORY = Path(__file__).parent
_loaded: dict[str, tuple[ModuleType | None, str | None]] = {}


def _facts() -> dict:
    """What the build wrote down about itself; empty if nothing was ever built here."""
    path = _DIRECTORY / "_build_facts.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    facts = _facts()
    built = importlib.util.find_spec(f"llmkernels._{name}") is not None
    if not built:
        return None, f"not built ({facts.get('absent', {}).get(name, 'no compiled part; see `make build`')})"
    built_for, running = facts.get("torch", "an unknown version"), torch.__version__
    if built_for != running:
        return None, (
            f"built for torch {built_for}, but torch {running} is running: rebuild with "
            "`python setup.py build_ext --inplace` or `pip install --no-build-isolation -e .`"
        )
    try:
        return importlib.import_module(f"llmkernels._{name}"), None
    except ImportError as error:
        return None, f"failed to import: {error}"


def module(name: str) -> ModuleType | None:
    """The compiled module "cpu" or "cuda", or None; `why_absent` then says why."""
    if name not in _loaded:
        _loaded[name] = _load(name)
    return _loaded[name][0]


def why_absent(name: str) -> str | None:
    """None if the compiled module "cpu" or "cuda" is loaded, else one sentence."""
    if name not in _loaded:
        _loaded[name] = _load(name)
    return _loaded[name][1]
