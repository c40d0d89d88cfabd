"""torch.nn.Softmax and LogSoftmax along the last dimension, where there is enough to do; smaller calls are torch's."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmkernels import functional
from llmkernels._dtypes import FLOAT_DTYPES, autocast_dtype
from llmkernels.accelerate.candidate import Candidate, Found, Trial, device_of, original_forward, parameter_dtype

# Elements from which ours is faster, forward alone and with the backward, in fp32 and bf16 (EPYC, one thread: of 2**16
# 1.1x to 1.3x and 0.9x to 1.0x, of 2**18 1.3x to 1.5x and 1.1x to 1.3x); below, the checks of a call cost more.
ENOUGH = 2**17
_CLASSES = 24


def recognise(module: nn.Module) -> Found:
    log = type(module).forward is nn.LogSoftmax.forward
    if not log and type(module).forward is not nn.Softmax.forward:
        return None
    if module.dim is None:
        return [], "its dim is None, for which torch takes a dimension by the shape of each input"
    op, run = "log_softmax" if log else "softmax", _Softmax(log)
    return [Candidate(op, op, (), run, trials=run.trials, timed=run.timed, example=_example)], ""


def _example(module: nn.Module) -> tuple[Tensor | None, ...]:
    return torch.empty(1, 1024, dtype=parameter_dtype(module), device=device_of(module)), None


@dataclass(frozen=True)
class _Softmax:
    log: bool

    def __call__(self, module: nn.Module, input: Tensor, *, backend: str | None = None) -> Tensor:
        last = module.dim in (-1, input.dim() - 1) and input.dtype in FLOAT_DTYPES
        if not last or input.numel() < ENOUGH or autocast_dtype(input.device) is not None:
            return original_forward(module)(module, input)
        return self.ours(input, backend)

    def ours(self, input: Tensor, backend: str | None) -> Tensor:
        return (
            functional.log_softmax(input, backend=backend) if self.log else functional.softmax(input, backend=backend)
        )

    def trials(self, module: nn.Module, dtype: torch.dtype, backend: str | None) -> list[Trial]:
        """Rows of scales 0.01 to 3 and mean 3, along the last dimension; larger ones would be one-hot but for rounding.

        In softmax one element takes no part. The logarithm of its zero has no gradient of ours, and one of torch's.
        """
        generator = torch.Generator().manual_seed(11)
        rows = torch.randn(2, 9, _CLASSES, generator=generator, dtype=torch.float64) + 3.0
        rows = rows * torch.logspace(-2, 0.5, 9, dtype=torch.float64)[:, None]
        rows[0, 3, 5] = rows[0, 3, 5] if self.log else -torch.inf
        return [self._trial(rows.to(device_of(module), dtype), backend)]

    def timed(self, module: nn.Module, dtype: torch.dtype, backend: str | None) -> Trial:
        """256 rows of 1,024 elements."""
        rows = torch.randn(256, 1024, generator=torch.Generator().manual_seed(11))
        return self._trial(rows.to(device_of(module), dtype), backend)

    def _trial(self, rows: Tensor, backend: str | None) -> Trial:
        original = (nn.LogSoftmax if self.log else nn.Softmax)(-1)
        return Trial(original, lambda x: self.ours(x, backend), (rows,))
