"""What several tests need: Python in a process of its own, exported programs, any number of threads."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_python(code: str, folder: Path | None = None, **environment: str) -> str:
    """Run Python code in a process of its own, without Triton's interpreter; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check_exported(program: torch.export.ExportedProgram, op: str, arguments: tuple, expected: Any, folder: Path):
    """A program has `op`, which picks a backend when it runs, and nothing of one backend. Saved, it gives `expected` in
    a process in which nothing is compiled."""
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert f"llmkernels.{op}.default" in names and not any("llmkernels_" in name for name in names)
    torch.export.save(program, folder / "program.pt2")
    torch.save((arguments, expected), folder / "pair.pt")
    run_python(
        """
        import llmkernels._native as native; native.why_absent = lambda name: 'absent for this test'
        import llmkernels, torch; arguments, expected = torch.load('pair.pt')
        torch.testing.assert_close(torch.export.load('program.pt2').module()(*arguments), expected)
        """,
        folder,
    )


def with_threads(function: Callable[[], Any], counts: tuple[int, ...] = (1, 2, 3, 8)) -> list:
    """What `function` gives with each number of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return results


def assert_same_with_any_threads(function: Callable[[], dict[str, torch.Tensor]]) -> None:
    """Named tensors, bitwise."""
    first, *others = with_threads(function)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
