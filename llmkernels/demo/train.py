"""Train several copies of a model side by side, and judge whether their loss curves are the same."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmkernels.demo.text import batch


@dataclass
class Run:
    """One model in training, with the rows of each batch reversed if `reverse`. `seconds` has each step's time."""

    name: str
    model: nn.Module
    threads: int
    reverse: bool = False
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.01)

    def step(self, tokens: Tensor, targets: Tensor, scale: float) -> None:
        torch.set_num_threads(self.threads)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 * scale
        if self.reverse:
            tokens, targets = tokens.flip(0), targets.flip(0)
        begin = time.perf_counter()
        loss = nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())  # also waits for a GPU
        self.seconds.append(time.perf_counter() - begin)


def lockstep(
    runs: list[Run], data: Tensor, steps: int, size: int, length: int, seed: int, device: str
) -> Iterator[int]:
    """Give every run the same batch, one after the other, so that a machine that slows down slows all of them."""
    for step in range(steps):
        tokens, targets = (t.to(device) for t in batch(data, step, size, length, seed))
        scale = min(1.0, (step + 1) / 20) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        # In turns, so that none of them always starts with cold caches.
        for index in range(len(runs)):
            runs[(index + step) % len(runs)].step(tokens, targets, scale)
        yield step


@torch.no_grad()
def bits_per_byte(model: nn.Module, data: Tensor, size: int, length: int, batches: int, device: str) -> float:
    """The mean loss on held-out text, in bits per byte."""
    total = 0.0
    for index in range(batches):
        tokens, targets = (t.to(device) for t in batch(data, index, size, length, seed=77))
        total += nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).item()
    return total / batches / math.log(2)


@dataclass(frozen=True)
class Agreement:
    """Whether two curves are the same training. `difference` and `spread` are the largest of any step."""

    agrees: bool
    difference: float
    spread: float
    allowed: float


# Relative to the loss: what fp32 rounding alone may do where two eager runs happen to round alike.
ROUNDING = 2e-5


def agreement(eager: list[float], accelerated: list[float], eager_other_order: list[float]) -> Agreement:
    """Judge `accelerated` by the spread of two eager runs that differ only in the order of the rows of each batch.

    Training amplifies rounding: two correct runs drift apart, ever faster. So the yardstick is what eager PyTorch does
    to itself: the largest difference of the accelerated curve over all steps is at most twice the largest difference
    of the two eager ones, or `ROUNDING` of the loss if they never differ. A wrong norm is off by far more from the
    first steps on, before anything has been amplified.
    """
    difference = max(abs(a - b) for a, b in zip(eager, accelerated, strict=True))
    spread = max(abs(a - b) for a, b in zip(eager, eager_other_order, strict=True))
    allowed = max(2.0 * spread, ROUNDING * max(eager))
    return Agreement(difference <= allowed, difference, spread, allowed)
