"""The `backend` parameter, what must have run at the end, and the closing table of what was skipped and why."""

import collections
import itertools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if not torch.cuda.is_available():
    # Read by Triton when a kernel is decorated, so it is set before anything imports one.
    os.environ["TRITON_INTERPRET"] = "1"

# Tests start processes of their own, which have to find the package without an installation.
_root = str(Path(__file__).resolve().parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_root, os.environ.get("PYTHONPATH"))))

import llmkernels
from llmkernels import _native, _op, registry
from tests.ptxsim import backend as simulated

simulated.register()
ISAS = ("default", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx", "amx_emulated")  # of the cpu backend
# What tests of an op run on. A simulated Triton kernel costs a compilation, so those have tests of their own.
TESTED = (*registry.BACKENDS, *simulated.CUDA)

COVERAGE = Path(__file__).with_name("coverage.toml")
_covered: set[tuple[str, ...]] = set()
_outcomes: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
_reasons: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)


def device_of(backend: str) -> str:
    """Where a backend is tested: on a GPU if there is one; Triton's interpreter runs on the CPU."""
    on_gpu = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    return "cuda" if on_gpu else "cpu"


def absent(backend: str) -> str | None:
    """Why this machine cannot run any test of a backend, or None."""
    if backend == "cuda":
        return _native.why_absent("cuda") or (None if torch.cuda.is_available() else "no CUDA device")
    if backend == "triton":
        return _op.triton_absent() or (None if torch.cuda.is_available() else _interpreter_broken())
    if backend not in registry.BACKENDS:
        return simulated.absent(backend)
    return _native.why_absent("cpu") if backend == "cpu" else None


def _interpreter_broken() -> str | None:
    import numpy
    import triton

    versions = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        return f"the interpreter of triton {triton.__version__} cannot run loops with numpy {numpy.__version__}"
    return None


def excused(backend: str) -> str | None:
    """Why this machine need not run a backend's lines of coverage.toml, or None."""
    return absent(backend) if backend in registry.BACKENDS else simulated.excused(backend)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter patches its language in every call of a nested kernel, which takes longer than most of these
    calls. Once for each module is enough: a launch patches `tl` itself, and nobody takes back what nested calls do."""
    if os.environ.get("TRITON_INTERPRET") != "1" or _op.triton_absent():
        return
    from triton.runtime.interpreter import InterpretedFunction

    if not hasattr(InterpretedFunction, "rewrite"):
        return
    usual, patched = InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn.__module__)
        return usual(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


@pytest.fixture(params=TESTED)
def backend(request) -> str:
    """Each backend by name; skipped with its own sentence where its tool is absent."""
    parameters = request.node.callspec.params
    op = parameters.get("op") or getattr(parameters.get("case"), "op", None)
    reason = absent(request.param)
    if reason is None and op in registry.ops() and not registry.has(op, request.param):
        reason = f"{op} has no such kernel"
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend) -> str:
    return device_of(backend)


@pytest.fixture(params=ISAS)
def isa(request) -> str:
    """The cpu backend on each instruction set by name; skipped where it was not built or the processor lacks it."""
    if absent("cpu"):
        pytest.skip(f"cpu: {absent('cpu')}")
    module = _native.module("cpu")
    if request.param not in module.available_isas():
        pytest.skip(f"cpu: {request.param} does not run on this machine")
    before = module.isa()
    module.force_isa(request.param)
    yield request.param
    module.force_isa(before)


@dataclass(frozen=True)
class RawOps:
    """The ops of one namespace, with torch's own check of an op: schema, fake, registrations, traced by a compiler."""

    ops: Any
    backend: str  # that the ops are of, or "torch"
    device: str
    checks: tuple[str, ...]

    def check(self, op, arguments) -> None:
        torch.library.opcheck(op, arguments, test_utils=self.checks)


@pytest.fixture(params=("cpu", "triton", "cuda", "cuda-sim-sm80", "portable"))
def raw(request) -> RawOps:
    """The kernels of each backend as ops, and the ops that pick one."""
    portable = request.param == "portable"
    backend = "torch" if portable else request.param
    if reason := absent(backend):
        pytest.skip(f"{backend}: {reason}")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    interpreted = backend == "triton" and device_of(backend) == "cpu"  # cannot be traced
    namespace = "llmkernels" if portable else f"llmkernels_{backend.replace('-', '_')}"
    return RawOps(getattr(torch.ops, namespace), backend, device_of(backend), checks[: 3 if interpreted else 4])


@pytest.fixture
def poison():
    """Fill what torch.empty and at::empty return with NaN, also inside the extension."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def covers():
    """Call with (op, backend, dtype, option, direction) once that line of coverage.toml has been verified."""
    return lambda *line: _covered.add(tuple(map(str, line)))


def pytest_collection_modifyitems(config, items):
    """Filters of `make test OP=layer_norm BACKEND=cpu`."""
    op, chosen = os.environ.get("OP"), os.environ.get("BACKEND")
    if not (op or chosen):
        return

    def wanted(item) -> bool:
        parameters = getattr(item, "callspec", None)
        values = [str(value) for value in parameters.params.values()] if parameters else []
        of_op = not op or op in item.nodeid or any(value.startswith(f"{op}-") for value in values)
        return of_op and (not chosen or not parameters or parameters.params.get("backend", chosen) == chosen)

    dropped = [item for item in items if not wanted(item)]
    items[:] = [item for item in items if wanted(item)]
    config.hook.pytest_deselected(items=dropped)
    config.stash[_FILTERED] = True


_FILTERED = pytest.StashKey[bool]()


def pytest_deselected(items):
    if items:
        items[0].config.stash[_FILTERED] = True


def _key(nodeid: str, keywords) -> tuple[str, str]:
    subject = Path(nodeid.split("::")[0]).stem.removeprefix("test_")
    parameters = re.split(r"[\[\]]", nodeid)[1] if nodeid.endswith("]") else ""
    names = (*simulated.CUDA, *simulated.TRITON, *registry.BACKENDS)  # "cuda" is the beginning of others
    return subject, next((name for name in names if f"-{name}-" in f"-{parameters}-"), "all")


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome == "skipped":
        key = _key(report.nodeid, report.keywords)
        _outcomes[key][report.outcome] += 1
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            _reasons[key][report.longrepr[2].removeprefix("Skipped: ")] += 1


def _missing_lines() -> list[str]:
    missing = []
    for block in tomllib.loads(COVERAGE.read_text())["must_run"]:
        lines = itertools.product(*(block[axis] for axis in ("ops", "backends", "dtypes", "options", "directions")))
        missing += [" ".join(line) for line in lines if excused(line[1]) is None and line not in _covered]
    return missing


def pytest_sessionfinish(session, exitstatus):
    """A complete run has to cover every line of coverage.toml."""
    whole = Path(__file__).parent.resolve()
    config = session.config
    arguments = {Path(str(argument).split("::")[0]).resolve() for argument in config.args}
    complete = arguments in ({whole}, {whole.parent}) and not config.stash.get(_FILTERED, False)
    if complete and not config.option.collectonly and exitstatus == pytest.ExitCode.OK:
        session.stash[_MISSING] = _missing_lines()
        if session.stash[_MISSING]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    config.stash[_SESSION] = session


_MISSING = pytest.StashKey[list]()
_SESSION = pytest.StashKey[pytest.Session]()


def pytest_terminal_summary(terminalreporter, config):
    write = terminalreporter.write_line
    terminalreporter.section("what ran")
    for (subject, name), counts in sorted(_outcomes.items()):
        numbers = "  ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        write(f"{subject:<22} {name:<15} {numbers}")
        for reason, count in _reasons[subject, name].most_common():
            write(f"{'':<38} {count} x {reason}")
    missing = config.stash[_SESSION].stash.get(_MISSING, []) if _SESSION in config.stash else []
    if missing:
        terminalreporter.section("listed in coverage.toml but not covered", red=True)
        for line in missing:
            write(line)


def pytest_report_header():
    present = ", ".join(name if reason is None else f"no {name}" for name, reason in llmkernels.backends().items())
    return f"llmkernels {llmkernels.__version__}: {present}"
