"""A Transformer learns to write Python, byte by byte, and samples with a cache of keys and values.

Two models, of 2 and of 6 layers: causal self-attention with 8 heads, width 512, feed-forward 2,048. With llmkernels,
`accelerate` swaps the norms, and the two functions that the attention calls are given by hand: one for training and one
for a step of sampling against the cache.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkernels
from common import Run, Study, main
from llmkernels import functional
from llmkernels.demo.text import batch, read, split

BATCH, LENGTH, WIDTH, HEADS, HIDDEN = 4, 128, 512, 8, 2048
SAMPLED = 64


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of `[B, S, H, D]`, by torch."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def attend_cached(q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """One more position after `length`, by torch: k and v go into the cache `[B, T, H, D]`."""
    keys[:, length : length + 1], values[:, length : length + 1] = k, v
    seen = (part[:, : length + 1].transpose(1, 2) for part in (keys, values))
    return F.scaled_dot_product_attention(q.transpose(1, 2), *seen).transpose(1, 2)


def fast_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def fast_attend_cached(q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    return functional.attention_kvcache(q, keys, values, k=k, v=v, cache_seqlens=length)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor, attention) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        x = x + self.out(attention(q, k, v).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Model(nn.Module):
    def __init__(self, layers: int):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)
        self.attend, self.attend_cached = attend, attend_cached
        for embedding in (self.bytes, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x, self.attend)
        return self.head(self.norm(x))

    def step(self, token: Tensor, caches: list[tuple[Tensor, Tensor]], length: int) -> Tensor:
        """Logits `[B, 256]` after `token` `[B, 1]`, the one after `length` that the caches hold."""
        x = self.bytes(token) + self.places.weight[length]
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, lambda q, k, v, cache=cache: self.attend_cached(q, *cache, k, v, length))
        return self.head(self.norm(x))[:, -1]


def loss(run: Run, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(run.model(tokens).flatten(0, 1), targets.flatten())


def held_out(model: Model, data: Tensor, device: str) -> float:
    losses = []
    for step in range(4):
        tokens, targets = (part.to(device) for part in batch(data, step, BATCH, LENGTH, seed=9))
        losses.append(F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()))
    return float(sum(losses)) / len(losses)


def sample(model: Model, prompt: bytes, count: int, device: str) -> bytes:
    """`prompt` continued by the likeliest byte, `count` times, each against the cache of those before it."""
    shape = (1, LENGTH, HEADS, WIDTH // HEADS)
    caches = [tuple(torch.zeros(shape, device=device) for _ in range(2)) for _ in model.layers]
    text = list(prompt)
    for length in range(len(prompt) + count - 1):
        logits = model.step(torch.tensor([[text[length]]], device=device), caches, length)
        if length == len(text) - 1:
            text.append(int(logits.argmax()))
    return bytes(text)


def prepare(model: Model):
    model.attend, model.attend_cached = fast_attend, fast_attend_cached
    return llmkernels.accelerate(model)


PRODUCTS = "matrix products, which are torch's in both, are nearly all of it"
CALLS = "a step is short: checking and choosing takes longer than torch's own calls do, at every layer"


def run(args, console) -> int:
    data = split(read(args.text))
    return max(study(args, console, data, layers) for layers in (2, 6))


def study(args, console, data: tuple[Tensor, Tensor], layers: int) -> int:
    """Train, sample and compare a model of so many layers; 0 if both ways agree."""
    train, held = data
    torch.manual_seed(args.seed)
    name = f"transformer_language_model_{layers}_layers"
    study = Study(name, args, console, Model(layers).to(args.device), prepare)
    tokens = lambda step: batch(train, step, BATCH, LENGTH, seed=args.seed)
    study.train(tokens, loss, items=BATCH * LENGTH, unit="bytes", rate=3e-4, slower=PRODUCTS)
    study.value("held-out loss", "nats", lambda model: held_out(model, held, args.device))
    write = lambda model: sample(model.eval(), b"import os\n", SAMPLED, args.device)
    undone = study.undone()
    undone.attend, undone.attend_cached = attend, attend_cached
    with torch.no_grad():
        texts = [write(model) for model in (undone, study.fast)]
    study.facts["same_text"] = texts[0] == texts[1]
    both = (lambda: write(study.plain), lambda: write(study.fast))
    study.time("sampling with a cache", "bytes", SAMPLED, *both, slower=CALLS)
    console.print("asked to continue 'import os':", style="bold")
    console.print(texts[1].decode("utf-8", "replace"), markup=False, highlight=False)
    return max(study.finish(), 0 if study.facts["same_text"] else 1)


if __name__ == "__main__":
    sys.exit(main(run, __doc__, steps=40))
