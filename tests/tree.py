"""Copies of this checkout, for tests that build, install or change it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_NOT_COPIED = shutil.ignore_patterns(
    ".git",
    ".venv",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".pytest_cache",
    ".hypothesis",
    ".ruff_cache",
    "*-output",
)


def copy_tree(to: Path, *, compiled: bool) -> Path:
    """The sources, and if `compiled` the modules that were built here too."""
    shutil.copytree(ROOT, to, ignore=_NOT_COPIED)
    if not compiled:
        for path in [*to.rglob("*.so"), to / "llmkernels/_build_facts.json"]:
            path.unlink(missing_ok=True)
    return to


def run(*command: str | Path, cwd: Path, timeout: int = 600, **environment: str) -> subprocess.CompletedProcess:
    """Run a command away from this checkout: nothing of it is on the path. Output is captured."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "TRITON_INTERPRET", "OP", "BACKEND")
    }
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=timeout
    )


def python(*arguments: str | Path, cwd: Path, expect: int = 0, **environment: str) -> str:
    """Run this interpreter; its output, both streams. Fails unless it exits with `expect`."""
    done = run(sys.executable, *arguments, cwd=cwd, **environment)
    output = done.stdout + done.stderr
    assert done.returncode == expect, f"exit {done.returncode}\n{output[-4000:]}"
    return output
