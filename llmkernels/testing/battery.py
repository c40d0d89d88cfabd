"""Run a case on a backend and judge every output and gradient by the tolerance rule.

`cases` is the op family's module (llmkernels.ops.<family>.cases), `case` one of its cases.
"""

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


def judge_results(
    cases: ModuleType, case, inputs: Inputs, actual: dict[str, Tensor], *, partial: bool = False
) -> dict[str, Difference]:
    """Compare results made elsewhere, for instance by a deliberately wrong variant; `partial`: some may be absent."""
    truth, yardstick = cases.truth(case, inputs), baseline(cases, case, inputs)
    if not (set(actual) <= set(truth) if partial else set(actual) == set(truth)):
        raise AssertionError(f"{case}: results {sorted(actual)}, expected {sorted(truth)}")
    return {
        name: compare_rows(
            *(cases.as_rows(case, name, results[name]) for results in (actual, truth, yardstick)),
            tolerance=GRADIENT if name.startswith("d") else OUTPUT,
            floor=cases.term_size(case, inputs, name),
        )
        for name in actual
    }


def failures(differences: dict[str, Difference]) -> list[str]:
    """One sentence for each result that the rule rejects."""
    return [f"{name}: {difference.message}" for name, difference in differences.items() if difference.message]
