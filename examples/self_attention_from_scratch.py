"""Self-attention as textbooks write it, made faster without touching the code, and then by changing three lines.

Query, key and value by linear layers, softmax(Q K^T / sqrt(d)) V, a feed-forward layer with ReLU, norms. First
`llmkernels.accelerated()` surrounds code that stays as it is: torch's own functions inside it are ours. Then the three
lines of attention become one call, and the scores of all pairs are never held.
"""

import contextlib
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkernels
from common import Study, main
from llmkernels import functional
from llmkernels.demo.text import batch, read, split

BATCH, LENGTH, WIDTH, HEADS, LAYERS = 2, 512, 256, 4, 2


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        return torch.softmax(scores.masked_fill(later, -torch.inf), -1) @ v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class ThreeLinesLess(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = SelfAttention()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.feed_forward(self.norms[1](x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)
        self.around = contextlib.nullcontext

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss."""
        with self.around():
            x = self.bytes(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
            logits = self.head(self.norm(self.layers(x)))
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def no_touch(model: Model) -> str:
    model.around = llmkernels.accelerated
    return "the code stays as it is, and runs inside llmkernels.accelerated()"


def three_lines(model: Model) -> str:
    for layer in model.layers:
        layer.attention.__class__ = ThreeLinesLess
    model.around = llmkernels.accelerated
    return "as before, and the three lines of attention are functional.scaled_dot_product_attention"


WRITTEN_OUT = "products, softmax and mask of the scores are nearly all of it, written out, so that they stay torch's"


def run(args, console) -> int:
    train, held = split(read(args.text))
    status = 0
    for name, prepare in (("no_touch", no_touch), ("three_lines", three_lines)):
        torch.manual_seed(args.seed)
        study = Study(f"self_attention_from_scratch_{name}", args, console, Model().to(args.device), prepare)
        tokens = lambda step: batch(train, step, BATCH, LENGTH, seed=args.seed)
        loss = lambda run, tokens, targets: run.model(tokens, targets)
        study.train(tokens, loss, items=BATCH * LENGTH, unit="bytes", slower=WRITTEN_OUT)
        tensors = tuple(part.to(args.device) for part in batch(held, 0, BATCH, LENGTH, seed=9))
        study.value("held-out loss", "nats", lambda model, tensors=tensors: model(*tensors))
        status = max(status, study.finish())
    return status


if __name__ == "__main__":
    sys.exit(main(run, __doc__, steps=60))
