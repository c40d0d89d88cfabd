"""Run a case on a backend and judge every output and gradient by the tolerance rule."""

from types import ModuleType

from llmkernels.testing.compare import GRADIENT, OUTPUT, Difference, compare_rows


def judge(cases: ModuleType, case, backend: str | None, device: str = "cpu", seed: int = 0) -> dict[str, Difference]:
    """Evaluate `case` on `backend` and compare each result with the fp64 truth.

    `cases` is the op family's module (llmkernels.ops.<family>.cases), `case` one of its cases. Returns a Difference
    for each output and gradient by name. Raises NoBackendError if the backend cannot run the case.
    """
    inputs = cases.make_inputs(case, device, seed)
    actual = cases.evaluate(case, inputs, backend)
    return judge_results(cases, case, inputs, actual)


def judge_results(cases: ModuleType, case, inputs, actual: dict) -> dict[str, Difference]:
    """Compare results made elsewhere, for instance by a deliberately wrong variant."""
    truth, baseline = cases.truth(case, inputs), cases.baseline(case, inputs)
    if set(actual) != set(truth):
        raise AssertionError(f"{case}: results {sorted(actual)}, expected {sorted(truth)}")
    return {
        name: compare_rows(
            *(cases.as_rows(case, name, results[name]) for results in (actual, truth, baseline)),
            tolerance=GRADIENT if name.startswith("d") else OUTPUT,
            floor=cases.term_size(case, inputs, name),
        )
        for name in truth
    }


def failures(differences: dict[str, Difference]) -> list[str]:
    """One sentence for each result that the rule rejects."""
    return [f"{name}: {difference.message}" for name, difference in differences.items() if difference.message]
