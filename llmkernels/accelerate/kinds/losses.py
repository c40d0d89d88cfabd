"""torch.nn.CrossEntropyLoss."""

import torch
from torch import Tensor, nn

from llmkernels import functional
from llmkernels.accelerate.candidate import Candidate, Found, Trial, device_of, parameter_dtype

_ROWS = 12


def recognise(module: nn.Module) -> Found:
    if type(module).forward is not nn.CrossEntropyLoss.forward:
        return None
    return [Candidate("cross_entropy", "cross_entropy", (), _loss, trials=_trials, timed=_timed, example=_example)], ""


def _loss(module: nn.CrossEntropyLoss, input: Tensor, target: Tensor, *, backend: str | None = None) -> Tensor:
    return functional.cross_entropy(
        input, target, module.weight, module.ignore_index, module.reduction, module.label_smoothing, backend=backend
    )


def _classes(module: nn.CrossEntropyLoss) -> int:
    return 10 if module.weight is None else module.weight.shape[0]


def _example(module: nn.CrossEntropyLoss) -> tuple[Tensor | None, ...]:
    rows = torch.empty(1, _classes(module), dtype=parameter_dtype(module), device=device_of(module))
    return rows, torch.zeros(1, dtype=torch.int64, device=rows.device), module.weight


def _timed(module: nn.CrossEntropyLoss, dtype: torch.dtype, backend: str | None) -> Trial:
    """256 rows of as many classes as there are weights for, or of 8,192."""
    generator, device = torch.Generator().manual_seed(7), device_of(module)
    classes = 8192 if module.weight is None else _classes(module)
    logits = torch.randn(256, classes, generator=generator).to(device, dtype)
    target = torch.randint(0, classes, (256,), generator=generator).to(device)
    return Trial(lambda x: module.forward(x, target), lambda x: _loss(module, x, target, backend=backend), (logits,))


def _trials(module: nn.CrossEntropyLoss, dtype: torch.dtype, backend: str | None) -> list[Trial]:
    """Indices with one to be ignored, probabilities, and classes that are not the last dimension."""
    generator, classes, device = torch.Generator().manual_seed(7), _classes(module), device_of(module)
    duplicate = nn.CrossEntropyLoss(
        None if module.weight is None else module.weight.detach().to(dtype),
        ignore_index=module.ignore_index, reduction=module.reduction, label_smoothing=module.label_smoothing,
    )  # fmt: skip
    logits = (4.0 * torch.randn(_ROWS, classes, generator=generator, dtype=torch.float64)).to(dtype).to(device)
    indices = torch.randint(0, classes, (_ROWS,), generator=generator).to(device)
    indices[3] = module.ignore_index
    probabilities = torch.rand(_ROWS, classes, generator=generator, dtype=torch.float64).to(dtype).to(device)
    cases = [(logits, indices), (logits.view(2, -1, classes).transpose(1, 2), indices.view(2, -1))]
    cases += [(logits, probabilities)] if module.ignore_index < 0 else []  # torch has no such index for these
    return [
        Trial(
            lambda x, target=target: duplicate(x, target),
            lambda x, target=target: _loss(duplicate, x, target, backend=backend),
            (x,),
        )
        for x, target in cases
    ]
