"""Run the cases of an op family: check each candidate's answer, then time all of them in turns."""

import dataclasses
import functools
import re
from collections.abc import Iterator

import torch

from llmkernels import ops, registry
from llmkernels.benchmarking.timer import interleave, ratio, summary
from llmkernels.testing.battery import expected, failures, judge_results
from llmkernels.testing.inputs import outputs_and_gradients

MODES = ("fwd", "fwd+bwd")
CALLS_FOR_OVERHEAD = 200
CALLS_ON_GPU = 20  # keeps its queue full, so that launches are hidden behind the kernels in front of them


@dataclasses.dataclass
class Measured:
    """One case in one mode. `candidates` has a summary by name, `wrong` a sentence for what got no time."""

    case: str
    op: str
    mode: str
    dtype: str
    bytes: int
    candidates: dict[str, dict]
    wrong: dict[str, str]
    copy_ms: float | None = None
    flops: int | None = None  # where the family counts them: a `flops` in its cases.py
    best_peer: str | None = None
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)  # backend -> times faster than the best peer

    def bandwidth(self, name: str) -> float:
        """GB/s: the bytes the op must move over the median time."""
        return self.bytes / self.candidates[name]["median"] / 1e6

    def rate(self, name: str) -> float | None:
        """GFLOP/s: the operations that the maths asks for over the median time."""
        return self.flops / self.candidates[name]["median"] / 1e6 if self.flops else None

    def of_copy(self, name: str) -> float | None:
        """The fraction of the speed of copying as many bytes, measured in the same run."""
        return self.copy_ms / self.candidates[name]["median"] if self.copy_ms else None


def families(op: str | None, family: str | None) -> list[tuple]:
    """(cases module, bench module, ops) for what was asked for."""
    chosen = []
    for name in ops.FAMILIES if family is None else (family,):
        for cases in ops.all_cases(name):
            wanted = [known for known in cases.OPS if op in (None, known)]
            if wanted:
                chosen.append((cases, ops.bench_of(name), wanted))
    return chosen


def plan(chosen: list[tuple], *, full: bool, dtype: str | None, pattern: re.Pattern | None = None) -> list[tuple]:
    """(cases module, bench module, case, mode), the order of measurement; those whose "case mode" has `pattern`.

    A fifth element says whether gradients are checked: not where only the forward is timed.
    """
    work = []
    for cases, bench, wanted in chosen:
        for op in wanted:
            modes = MODES[: 1 if registry.entry(op, "torch").bwd is None else 2]
            for case in bench.bench_cases(op, full):
                if dtype in (None, str(case.dtype).removeprefix("torch.")):
                    work += [(cases, bench, case, mode) for mode in modes]
            if dtype in (None, "float32"):
                work.append((cases, bench, bench.overhead_case(op), "call"))
    work = [item for item in work if pattern is None or pattern.search(f"{item[2]} {item[3]}")]
    backwards = {str(case) for _, _, case, mode in work if mode == "fwd+bwd"}
    return [(*item, item[3] != "fwd" or str(item[2]) in backwards) for item in work]


def candidates_of(cases, bench, case, device: str, *, compiled: bool, backend: str | None = None) -> dict:
    """Name -> function of the inputs: our backends that can run here (or the one named), then the peers."""
    inputs = cases.make_inputs(case, device)
    found = {}
    for name in registry.BACKENDS if backend is None else (backend,):
        if name == "triton" and device == "cpu":
            continue  # its interpreter is for tests
        try:
            cases.call(case, inputs, name)
        except registry.NoBackendError:
            if backend is not None:
                raise
            continue
        found[name] = lambda inputs, name=name: cases.call(case, inputs, name)
    for name, function in bench.peers(case).items():
        if compiled or name != "torch.compile":
            found[name] = function
    return found


def measure(cases, bench, case, mode: str, gradients: bool, device: str, *, seconds: float, compiled: bool,
            cold: bool, backend: str | None = None) -> Measured:  # fmt: skip
    """Check (its `gradients` too) and time one case in one mode: "fwd", "fwd+bwd", or "call" (no gradient, many short
    calls)."""
    found, known = _checked(cases, bench, case, device, compiled, backend, gradients)
    wrong = dict(known)
    functions = {name: function for name, function in found.items() if name not in wrong}
    if mode != "fwd+bwd":
        inputs = cases.make_inputs(case, device, seed=1)
        tolerance = getattr(bench, "FORWARD_PEER_TOLERANCE", 1e-4)
        functions |= _right(cases, case, inputs, bench.forward_peers(case, device), wrong, tolerance)
    size = cases.bytes_moved(case, "fwd" if mode == "call" else mode)
    sets = _input_sets(cases, case, device, size if cold else 0)
    timed = {name: _timed(mode, function, sets) for name, function in functions.items()}
    copy = None
    if mode != "call":
        element = torch.empty(size // 2 // case.dtype.itemsize, dtype=case.dtype, device=device).uniform_()
        target = torch.empty_like(element)
        timed["copy"] = lambda: target.copy_(element)
    with torch.set_grad_enabled(mode == "fwd+bwd"):
        calls = CALLS_FOR_OVERHEAD if mode == "call" else CALLS_ON_GPU if device == "cuda" else 1
        times = interleave(timed, device, seconds, calls, overhead=mode == "call")
    if "copy" in times:
        copy = summary(times.pop("copy"))["median"]
    results = {name: summary(values) for name, values in times.items()}
    peers = [name for name in results if name not in registry.BACKENDS]
    best, ratios = None, {}  # no peer may be left: none was asked for, or all of them are wrong
    if peers:
        best = min(peers, key=lambda name: results[name]["median"])
        ratios = {name: ratio(times[best], times[name]) for name in results if name in registry.BACKENDS}
    dtype = str(case.dtype).removeprefix("torch.")
    flops = cases.flops(case, mode) if mode != "call" and hasattr(cases, "flops") else None
    return Measured(str(case), case.op, mode, dtype, size, results, wrong, copy, flops, best, ratios)


@functools.lru_cache(maxsize=1)  # both modes of a case, which follow each other: the fp64 truth can take a minute
def _checked(cases, bench, case, device: str, compiled: bool, backend: str | None,
             gradients: bool) -> tuple[dict, dict[str, str]]:  # fmt: skip
    """The candidates, and a sentence for each whose outputs or gradients are wrong."""
    functions = candidates_of(cases, bench, case, device, compiled=compiled, backend=backend)
    inputs = cases.make_inputs(case, device, seed=1)
    inputs = inputs if gradients else inputs.unwatched()
    plain = bench.without_chance(case) if hasattr(bench, "without_chance") else case
    if plain == case:
        return functions, _wrong(cases, case, inputs, functions)
    wrong = _wrong(cases, case, inputs, {name: functions[name] for name in functions if name in registry.BACKENDS})
    peers = bench.peers(plain).items()
    return functions, wrong | _wrong(cases, plain, inputs, {name: peer for name, peer in peers if name in functions})


PEER_ERROR = 0.05  # rms, of the rms size


def _wrong(cases, case, inputs, functions: dict) -> dict[str, str]:
    """A sentence for each function whose answer is wrong: by the rule, and for peers, which may round more than torch's
    eager code, from which the rule is made, where it is something else."""
    known, wrong = expected(cases, case, inputs), {}
    for name, function in functions.items():
        actual = outputs_and_gradients(inputs, function)
        if name in registry.BACKENDS:
            problems = failures(judge_results(cases, case, inputs, actual, known))
        else:
            pairs = {key: _distance(actual[key].double(), want) for key, want in known.truth.items()}
            problems = [f"{key} is off by {far:.3g} of {size:.3g}" for key, (far, size) in pairs.items()
                        if not far <= PEER_ERROR * size]  # fmt: skip
        if problems:
            wrong[name] = "; ".join(problems)
    return wrong


def _distance(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """(rms of the difference, rms of `want`); where `want` is infinite, as log_softmax is of what is hidden, `got` must
    be the same."""
    infinite = want.isinf()
    if not torch.equal(got[infinite], want[infinite]):
        return float("inf"), 0.0
    rms = lambda x: x.square().mean().sqrt().item() if x.numel() else 0.0
    return rms((got - want)[~infinite]), rms(want[~infinite])


def _right(cases, case, inputs, functions: dict, wrong: dict[str, str], tolerance: float) -> dict:
    """Those of `functions`, which have no backward, that agree with plain PyTorch; a sentence for each other one."""
    right = {}
    with torch.no_grad():
        expected = cases.call_torch(case, inputs)
        for name, function in functions.items():
            try:
                torch.testing.assert_close(function(inputs), expected, rtol=tolerance, atol=tolerance)
                right[name] = function
            except AssertionError as error:
                wrong[name] = str(error).splitlines()[0]
    return right


def _input_sets(cases, case, device: str, size: int) -> Iterator:
    """Endless inputs: always the same (warm), or enough of them that none is still in a cache (cold)."""
    count = 1 if size == 0 else max(2, (512 << 20) // max(size, 1))
    sets = [cases.make_inputs(case, device, seed).requiring_grad() for seed in range(count)]
    while True:
        yield from sets


def _timed(mode: str, function, sets: Iterator):
    if mode != "fwd+bwd":
        return lambda: function(next(sets))

    def step():
        inputs = next(sets)
        inputs.backward(function(inputs))

    return step
