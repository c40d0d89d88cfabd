"""`make new-op NAME=x`: a new op family whose tests pass, to be filled with the real thing.

Makes llmkernels/ops/x/ (op, reference, cases), csrc/ops/x/x.h, tests/ops/test_x.py and benchmarks/ops/bench_x.py, and
adds one line to llmkernels/functional.py. The skeleton is y = x * scale on the torch backend: write the reference and
the cases first, then a kernel for each backend (CONTRIBUTING.md).
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

OP = '''"""{name}: schema, fake, argument checks, autograd, backend order."""

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._autograd import needs_grad, transform_active
from llmkernels.ops.{name} import reference

_op.define_kernel(
    "{name}_fwd",
    "(Tensor x, float scale) -> Tensor",
    lambda x, scale: torch.empty_like(x),
    lambda x, scale: registry.pick("{name}", (x,)).fwd(x, scale),
)
_op.define_kernel(
    "{name}_bwd",
    "(Tensor dy, float scale) -> Tensor",
    lambda dy, scale: torch.empty_like(dy),
    lambda dy, scale: registry.pick("{name}", (dy,)).bwd(dy, scale),
)


class {camel}Function(torch.autograd.Function):
    """apply(x, scale, chosen) -> y."""

    @staticmethod
    def forward(ctx, x, scale, chosen):
        ctx.settings = (scale, chosen)
        return registry.entry("{name}", chosen).fwd(x, scale)

    @staticmethod
    def backward(ctx, dy):
        scale, chosen = ctx.settings
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return reference.{name}(dy, scale), None, None  # linear: its own derivative
        return registry.entry("{name}", chosen).bwd(dy, scale), None, None


def {name}(input: Tensor, scale: float = 1.0, *, backend: str | None = None) -> Tensor:
    """`input * scale`.

    Args:
        input: any shape, floating.
        scale: the factor.
        backend: "cuda" | "triton" | "cpu" | "torch"; default: the first that can run this call.
    Returns: the shape and dtype of `input`.
    Raises: TypeError, `input` is not floating; NoBackendError, a forced backend cannot run this call.
    """
    if not input.is_floating_point():
        raise TypeError(f"{name}: input has dtype {{input.dtype}}, expected a floating dtype")
    chosen = registry.pick("{name}", (input,), backend)
    if chosen.name == "torch" and transform_active():
        return reference.{name}(input, scale)
    if torch.compiler.is_exporting():
        chosen = registry.entry("{name}", registry.PORTABLE)
    if needs_grad(input):
        return {camel}Function.apply(input, scale, chosen.name)
    return chosen.fwd(input, scale)


# A kernel adds its backend: `registry.register("{name}", *_op.backends(...))` lists all four.
registry.register(
    "{name}",
    registry.Backend("{name}", "torch", reference.{name}, reference.{name}_bwd, lambda *_: None),
    registry.Backend(
        "{name}",
        registry.PORTABLE,
        torch.ops.llmkernels.{name}_fwd.default,
        torch.ops.llmkernels.{name}_bwd.default,
        lambda *_: None,
    ),
)
_op.define_public("{name}", "(Tensor input, float scale=1.0) -> Tensor", {name})
'''

REFERENCE = '''"""{name} in plain PyTorch: the `torch` backend and the truth in the tests."""


def {name}(x, scale):
    return x * scale


def {name}_bwd(dy, scale):
    return dy * scale
'''

CASES = '''"""What tests, `llmkernels check` and benchmarks run for {name}."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class {camel}Case:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    scale: float = 1.5


def make_inputs(case: {camel}Case, device="cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case.shape, generator=generator, dtype=torch.float64).to(case.dtype).to(device)


def bytes_moved(case: {camel}Case, direction: str) -> int:
    elements = torch.Size(case.shape).numel()
    return {{"fwd": 2, "bwd": 2, "fwd+bwd": 4}}[direction] * elements * case.dtype.itemsize


def test_cases() -> list[{camel}Case]:
    return [{camel}Case(shape, dtype) for shape in ((3, 5), (0, 4), (64,)) for dtype in (torch.float32, torch.bfloat16)]
'''

HEADER = '''// {name}: the contract between kernels and bindings. y = x * scale.
#pragma once

#include <cstdint>

namespace llmkernels {{

struct {camel}FwdParams {{
  const void* x;  // [size] T, contiguous
  void* y;        // [size] T, contiguous, may alias x
  int64_t size;
  double scale;
}};

}}  // namespace llmkernels
'''

TEST = '''"""{name}: the battery of every backend."""

import pytest
import torch

from llmkernels import functional, registry
from llmkernels.ops.{name} import cases


@pytest.mark.parametrize("case", cases.test_cases(), ids=str)
def test_matches_fp64_truth(case, backend, device, poison):
    x = cases.make_inputs(case, device).requires_grad_()
    if not registry.has("{name}", backend):
        pytest.skip(f"{{backend}}: {name} has no such kernel yet")
    y = functional.{name}(x, case.scale, backend=backend)
    torch.testing.assert_close(y.double(), x.double() * case.scale, rtol=torch.finfo(case.dtype).eps, atol=0)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(dx.double(), torch.full_like(dx.double(), case.scale), rtol=torch.finfo(case.dtype).eps, atol=0)


def test_gradcheck():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(functional.{name}, (x, 1.5))
    assert torch.autograd.gradgradcheck(functional.{name}, (x, 1.5))


def test_compile_and_op():
    x = torch.randn(3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: functional.{name}(x, 2.0), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), 2.0 * x)
    torch.testing.assert_close(torch.ops.llmkernels.{name}(x, 2.0), 2.0 * x)


def test_bad_dtype():
    with pytest.raises(TypeError, match="{name}: input has dtype torch.int64"):
        functional.{name}(torch.ones(2, dtype=torch.int64))
'''

BENCH = '''"""Time {name} beside plain PyTorch: `python benchmarks/ops/bench_{name}.py`."""

import torch

from llmkernels import functional
from llmkernels.benchmarking.timer import interleave, summary

if __name__ == "__main__":
    x = torch.randn(4096, 1024)
    times = interleave({{"llmkernels": lambda: functional.{name}(x, 1.5), "torch": lambda: x * 1.5}}, "cpu", 1.0)
    for name, values in times.items():
        print(name, summary(values))
'''


def main() -> int:
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    root = ROOT
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        print(f"new-op: NAME is {name!r}, expected lower-case words joined by _, as in `make new-op NAME=swiglu`")
        return 2
    package = root / "llmkernels" / "ops" / name
    if package.exists():
        print(f"new-op: {package.relative_to(root)} exists already")
        return 2
    words = {"name": name, "camel": "".join(word.capitalize() for word in name.split("_"))}
    files = {
        package / "__init__.py": "",
        package / "op.py": OP,
        package / "reference.py": REFERENCE,
        package / "cases.py": CASES,
        root / "csrc" / "ops" / name / f"{name}.h": HEADER,
        root / "tests" / "ops" / f"test_{name}.py": TEST,
        root / "benchmarks" / "ops" / f"bench_{name}.py": BENCH,
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(**words))
        print(f"made    {path.relative_to(root)}")
    functional = root / "llmkernels" / "functional.py"
    text = functional.read_text()
    line = f"from llmkernels.ops.{name}.op import {name}\n"
    text = text.replace("\n__all__ = [", f"{line}\n__all__ = [\n    \"{name}\",", 1)
    functional.write_text(text)
    print("changed llmkernels/functional.py\nnow: make test OP=" + name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
