"""The loss of transformers' models through their own hook, `model.loss_function`.

The hook is handed logits that the model returns too, so what replaces it is a cross entropy of logits: without their
copy in fp32 and with a gradient in one pass. linear_cross_entropy, which never makes logits, cannot stand there.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkernels.accelerate import timing
from llmkernels.accelerate.candidate import Trial, device_of, parameter_dtype
from llmkernels.accelerate.trials import compare, name_of
from llmkernels.accelerate.verify import TOLERANCE, own_tolerance
from llmkernels.ops.cross_entropy import op as cross_entropy
from llmkernels.ops.cross_entropy.reference import Settings

OP = "cross_entropy"
_CLASSES = 11


@dataclass(frozen=True)
class TokenLoss:
    """The cross entropy of tokens, each of which (`shifted`) is told from those before it: an fp32 number."""

    original: Any
    shifted: bool
    backend: str | None

    def __call__(self, logits: Tensor, labels: Tensor | None, vocab_size: int, num_items_in_batch=None,
                 ignore_index: int = -100, shift_labels: Tensor | None = None, **more) -> Tensor:  # fmt: skip
        if (shift_labels is not None and not self.shifted) or not logits.dtype.is_floating_point:
            more = more | ({} if shift_labels is None else {"shift_labels": shift_labels})
            return self.original(logits, labels, vocab_size, num_items_in_batch, ignore_index, **more)
        if shift_labels is None and self.shifted:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target = (labels if shift_labels is None else shift_labels).reshape(-1).to(logits.device)
        rows = logits.reshape(-1, vocab_size)
        may_ignore = cross_entropy.check_indices(OP, target, vocab_size, ignore_index)
        reduction = "mean" if num_items_in_batch is None else "sum"
        settings = Settings(ignore_index, 0.0, 0.0, 0.0)
        loss = cross_entropy.of_rows(
            rows, target.long(), None, reduction, settings, torch.float32, self.backend, may_ignore
        )
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch


@dataclass
class LossFunction:
    """`model.loss_function` as a setting that can be undone; `before` is what was set on the model itself, if any."""

    loss: TokenLoss
    before: Any

    @classmethod
    def set(cls, model: nn.Module, loss: TokenLoss) -> "LossFunction":
        before = vars(model).get("_loss_function")
        model.loss_function = loss
        return cls(loss, before)

    def undo(self, model: nn.Module) -> bool:
        if vars(model).get("_loss_function") is not self.loss:
            return False
        if self.before is None:
            del model._loss_function
        else:
            model.loss_function = self.before
        return True


def uses_hook(module: nn.Module) -> bool:
    """Whether a PreTrainedModel's forward calls its loss_function."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "loss_function" in code.co_names


def find(module: nn.Module, backend: str | None) -> tuple[TokenLoss | None, str | None, float]:
    """What may stand for a model's loss, or why nothing may; and the largest error seen."""
    original = module.loss_function
    parameters = inspect.signature(original).parameters
    if list(parameters)[:3] != ["logits", "labels", "vocab_size"]:
        return None, f"its loss {_name(original)} is not a cross entropy of tokens", 0.0
    problems = []
    for shifted in (True, False):
        loss = TokenLoss(original, shifted, backend)
        problem, error = _verify(module, loss)
        if problem is None:
            return loss, None, error
        problems.append(problem)
    return None, "; ".join(problems), error


def _name(function) -> str:
    return getattr(function, "__name__", type(function).__name__)


def trials(module: nn.Module, loss: TokenLoss, dtype: torch.dtype, length: int, classes: int) -> list[Trial]:
    """Both losses of one batch: the mean, by a number of tokens that is given, and with another index ignored."""
    device, generator = device_of(module), torch.Generator().manual_seed(9)
    logits = 4.0 * torch.randn(2, length, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (2, length), generator=generator).to(device)
    found = []
    for ignored, options in ((-100, {}), (-100, {"num_items_in_batch": 5}), (3, {"ignore_index": 3})):
        some = labels.clone()
        some[1, length // 2 :] = ignored
        found.append(
            Trial(
                lambda x, y=some, options=options: loss.original(x, y, classes, **options),
                lambda x, y=some, options=options: loss(x, y, classes, **options),
                (logits.to(dtype).to(device),),
            )
        )
    return found


def speed(module: nn.Module, loss: TokenLoss) -> float:
    """How many times as fast it is with as many classes as the model has, or 8,192."""
    classes = min(getattr(module.config, "vocab_size", 8192), 8192)
    trial = trials(module, loss, parameter_dtype(module), 64, classes)[0]
    return timing.ratio(timing.calls(trial, module.training))


def _verify(module: nn.Module, loss: TokenLoss) -> tuple[str | None, float]:
    worst = 0.0
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for dtype in (torch.float32, parameter_dtype(module)):
            for trial in trials(module, loss, dtype, 9, _CLASSES):
                problem, error = compare(trial, TOLERANCE.get(dtype) or own_tolerance(dtype), gradients=True)
                if problem:
                    return f"cross_entropy disagrees in {name_of(dtype)}: {problem}", error
                worst = max(worst, error if dtype.itemsize > 2 else 0.0)
    return None, worst
