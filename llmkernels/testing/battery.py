"""Run a case on a backend and judge every output and gradient by the tolerance rule.

`cases` is the op family's module (llmkernels.ops.<family>.cases), `case` one of its cases.
"""

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from llmkernels.testing.compare import GRADIENT, OUTPUT, Difference, compare_rows
from llmkernels.testing.inputs import Inputs, outputs_and_gradients


def evaluate(cases: ModuleType, case, inputs: Inputs, backend: str | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of the public function. Raises NoBackendError if the backend cannot run the case."""
    return outputs_and_gradients(inputs, lambda leaves: cases.call(case, leaves, backend))


def baseline(cases: ModuleType, case, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and gradients of plain PyTorch in the same dtype: its error is the yardstick."""
    return outputs_and_gradients(inputs, lambda leaves: cases.call_torch(case, leaves))


def judge(cases: ModuleType, case, backend: str | None, device: str = "cpu", seed: int = 0) -> dict[str, Difference]:
    """Evaluate `case` on `backend` and compare each result with the fp64 truth: a Difference by name."""
    inputs = cases.make_inputs(case, device, seed)
    return judge_results(cases, case, inputs, evaluate(cases, case, inputs, backend))


@dataclass(frozen=True)
class Expected:
    """What results of a case are compared with: the fp64 truth, what plain PyTorch gives, and what its sums are of."""

    truth: dict[str, Tensor]
    baseline: dict[str, Tensor]
    floors: dict[str, Tensor | None]


def expected(cases: ModuleType, case, inputs: Inputs) -> Expected:
    plain = baseline(cases, case, inputs)
    # Of unwatched inputs the baseline has outputs only, the truth of some families gradients still.
    truth = {name: value for name, value in cases.truth(case, inputs).items() if name in plain}
    floors = {name: cases.term_size(case, inputs, name) for name in truth}
    return Expected(truth, plain, floors)


def judge_results(
    cases: ModuleType, case, inputs: Inputs, actual: dict[str, Tensor], known: Expected | None = None
) -> dict[str, Difference]:
    """Compare results made elsewhere, for instance by a deliberately wrong variant; `known` saves making it again."""
    known = expected(cases, case, inputs) if known is None else known
    if set(actual) != set(known.truth):
        raise AssertionError(f"{case}: results {sorted(actual)}, expected {sorted(known.truth)}")
    return {
        name: compare_rows(
            *(cases.as_rows(case, name, results[name]) for results in (actual, known.truth, known.baseline)),
            tolerance=GRADIENT if name.startswith("d") else OUTPUT,
            floor=known.floors[name],
        )
        for name in known.truth
    }


def failures(differences: dict[str, Difference]) -> list[str]:
    """One sentence for each result that the rule rejects."""
    return [f"{name}: {difference.message}" for name, difference in differences.items() if difference.message]
