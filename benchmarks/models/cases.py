"""The models of the table, and what is done with each: in eager PyTorch, with llmkernels, quantized.

All have random weights: what is measured does not depend on them.
"""

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """Of the models: the table's own (CPU, minutes), or those that only show that the script works."""

    lstm: tuple[int, int, int] = (512, 32, 128)  # width, batch, length
    transformer: tuple[int, int, int] = (6, 512, 8)  # layers, width, heads
    tokens: int = 1024  # of a batch of the Transformer and of BERT
    lengths: tuple[int, ...] = (256, 1024)
    bert: tuple[int, int, int, int] = (6, 384, 12, 64)  # layers, width, heads, length
    llama: tuple[int, int, int] = (8, 512, 1408)  # layers, width, width of the MLP
    vocabulary: int = 8192
    prompt: int = 64
    generated: int = 32


QUICK = Sizes((32, 2, 8), (1, 32, 2), 32, (16,), (1, 32, 2, 8), (1, 32, 48), 64, 8, 4)


class LSTMModel(nn.Module):
    """Bytes, two layers of LSTM, a head."""

    def __init__(self, width: int):
        super().__init__()
        self.bytes, self.head = nn.Embedding(256, width), nn.Linear(width, 256)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)

    def forward(self, tokens: Tensor, state=None):
        output, state = self.lstm(self.bytes(tokens), state)
        return self.head(output), state


class Layer(nn.Module):
    """Norm first, causal attention by torch's function, an MLP with GELU."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.mlp_norm(x))


class TransformerModel(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, length: int):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.layers(x)))


@dataclass
class Runner:
    """One model in one of the ways; `call` is what is timed, `answer` gives what is compared."""

    model: nn.Module
    call: Callable[[], object]
    answer: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None = None

    def held(self) -> int:
        """Bytes that lie between two calls: weights, and the state of the optimizer."""
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [value for values in state for value in values.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class Case:
    """One line of the table: `make` gives the model, which is trained on `loss`, or does `run`, or just its forward.

    `by_functions`: attention and loss are torch's functions, which `with llmkernels.accelerated()` replaces.
    `products_stay`: matrix products are torch's in every way, so there is a bound of what can be won.
    """

    model: str
    mode: str
    unit: str
    items: int
    make: Callable[[], nn.Module]
    logits: Callable[[nn.Module], Tensor]
    goal: str
    loss: Callable[[nn.Module], Tensor] | None = None
    run: Callable[[nn.Module, bool], object] | None = None
    schemes: tuple[tuple[str, str], ...] = ()  # (scheme, dtype of the activations)
    by_functions: bool = False
    products_stay: bool = True

    def runners(self) -> Iterator[tuple[str, Runner]]:
        torch.manual_seed(0)
        base = self.make().eval()
        for dtype in DTYPES:
            yield f"eager {dtype}", self._runner(copy.deepcopy(base).to(DTYPES[dtype]), False)
        for dtype in DTYPES:
            yield f"llmkernels {dtype}", self._runner(copy.deepcopy(base).to(DTYPES[dtype]), True)
        for scheme, dtype in self.schemes:
            yield f"llmkernels {scheme}", self._runner(copy.deepcopy(base).to(DTYPES[dtype]), True, scheme)

    def _runner(self, model: nn.Module, fast: bool, scheme: str | None = None) -> Runner:
        if fast:
            llmkernels.accelerate(model)
        if scheme is not None:
            llmkernels.quantize(model, scheme, progress=False)
        scope = llmkernels.accelerated if fast and self.by_functions else contextlib.nullcontext

        @torch.no_grad()
        def answer() -> Tensor:
            with scope():
                return self.logits(model.eval()).float()

        if self.loss is None:
            call = answer if self.run is None else torch.no_grad()(lambda: self.run(model.eval(), fast))
            return Runner(model, call, answer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step() -> None:
            with scope():
                self.loss(model.train()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return Runner(model, step, answer, optimizer)


def cases(sizes: Sizes) -> Iterator[Case]:
    yield from _lstm(sizes)
    yield from _transformer(sizes)
    if importlib.util.find_spec("transformers") is not None:
        yield from _bert(sizes)
        yield from _llama(sizes)


def _next_bytes(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def _lstm(sizes: Sizes) -> Iterator[Case]:
    width, batch, length = sizes.lstm
    tokens = torch.randint(256, (batch, length))
    common = {"make": lambda: LSTMModel(width), "logits": lambda model: model(tokens)[0], "by_functions": True,
              "products_stay": False}  # fmt: skip
    name = f"LSTM language model, 2 x {width}"
    yield Case(name, f"train, {batch} x {length}", "tokens", tokens.numel(), **common,
               loss=lambda model: _next_bytes(model(tokens)[0], tokens), goal="1.5x fp32, 3x bf16")  # fmt: skip
    yield Case(name, f"inference, {batch} x {length}", "tokens", tokens.numel(), **common, goal="1.3x")

    def one_by_one(model: nn.Module, fast: bool) -> None:
        state = None
        for token in tokens[:1, : sizes.generated].split(1, 1):
            _, state = model(token, state)

    yield Case(name, "one token at a time", "tokens", min(sizes.generated, length), **common, run=one_by_one,
               goal="3x")  # fmt: skip


def _transformer(sizes: Sizes) -> Iterator[Case]:
    layers, width, heads = sizes.transformer
    name = f"Transformer language model, {layers} x {width}"
    for length in sizes.lengths:
        tokens = torch.randint(256, (max(1, sizes.tokens // length), length))
        common = {
            "make": lambda length=length: TransformerModel(layers, width, heads, length),
            "logits": lambda model, tokens=tokens: model(tokens), "by_functions": True,
        }  # fmt: skip
        shape = f"{tokens.shape[0]} x {length}"
        yield Case(name, f"train, {shape}", "tokens", tokens.numel(), **common,
                   loss=lambda model, tokens=tokens: _next_bytes(model(tokens), tokens),
                   goal="1.3x" if length >= 1024 else "1.1x")  # fmt: skip
        yield Case(name, f"inference, {shape}", "tokens", tokens.numel(), **common, goal="1.3x")


def _bert(sizes: Sizes) -> Iterator[Case]:
    import transformers

    layers, width, heads, length = sizes.bert
    config = transformers.BertConfig(
        vocab_size=sizes.vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=length, num_labels=8, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    rows = max(1, sizes.tokens // length)
    tokens, labels = torch.randint(sizes.vocabulary, (rows, length)), torch.randint(8, (rows,))
    common = {
        "make": lambda: transformers.BertForSequenceClassification(config),
        "logits": lambda model: model(tokens).logits,
    }
    name = f"BERT classifier, {layers} x {width}"
    yield Case(name, f"train, {rows} x {length}", "rows", rows, **common, goal="1.2x",
               loss=lambda model: model(tokens, labels=labels).loss)  # fmt: skip
    yield Case(name, f"inference, {rows} x {length}", "rows", rows, **common, goal="1.5x; w8a8 2x fp32",
               schemes=(("w8a8", "fp32"),))  # fmt: skip


def _llama(sizes: Sizes) -> Iterator[Case]:
    import transformers

    layers, width, inner = sizes.llama
    length, count = sizes.lengths[0], sizes.generated
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2 * length, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    tokens = torch.randint(1, sizes.vocabulary, (2, length))
    prompt = tokens[:1, : sizes.prompt]

    def decode(model: nn.Module, fast: bool) -> Tensor:
        if fast:
            return llmkernels.generate(model, prompt, max_new_tokens=count)
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)

    common = {
        "make": lambda: transformers.LlamaForCausalLM(config),
        "logits": lambda model: model(tokens, use_cache=False).logits,
    }
    name = f"LLaMA-style decoder, {layers} x {width}"
    yield Case(name, f"train, 2 x {length}", "tokens", tokens.numel(), **common, goal="1.5x",
               loss=lambda model: model(tokens, labels=tokens, use_cache=False).loss)  # fmt: skip
    yield Case(name, f"greedy decode, {sizes.prompt} + {count}", "tokens", count, **common, run=decode,
               products_stay=False, goal="1.5x; int8 1.8x bf16, int4 3x bf16",
               schemes=(("int8", "bf16"), ("int4", "bf16")))  # fmt: skip
