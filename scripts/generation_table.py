"""The tables of docs/generation.md: one decoded token, by the caches and by where its time goes; one thread.

python scripts/generation_table.py          # tokens after contexts of several lengths; needs transformers
python scripts/generation_table.py parts    # one int4 token, of which one part after another is left out
"""

import contextlib
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
import transformers

import llmkernels
from llmkernels import machine, nn
from llmkernels.accelerate.huggingface.deferred import CachedStates
from llmkernels.accelerate.kinds import gated, norms, rotary
from llmkernels.huggingface import PagedCache, StaticCache
from llmkernels.huggingface.layers import StaticLayer

LAYERS, KEY_HEADS, HEAD_DIM = 8, 2, 64
CONTEXTS = ((1, 64), (1, 512), (1, 2048), (1, 8192), (4, 1024))  # rows, tokens before
SECONDS = 14.0  # for each line
CONFIG = transformers.LlamaConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=LAYERS, num_attention_heads=8,
    num_key_value_heads=KEY_HEADS, max_position_embeddings=16384, tie_word_embeddings=False, pad_token_id=0,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(CONFIG).eval().to(torch.bfloat16)
    fast = llmkernels.accelerate(plain, inplace=False).model
    int4 = copy.deepcopy(fast)
    llmkernels.quantize(int4, "int4", progress=False)
    return {"eager": plain, "bf16": fast, "int4": int4}


def cache_of(kind: str, rows: int, length: int):
    """With keys of `length` tokens, and room for a few more."""
    if kind == "dynamic":
        cache = transformers.DynamicCache(config=CONFIG)
    else:
        room = length + 8
        cache = StaticCache(CONFIG, room) if kind == "static" else PagedCache(CONFIG, rows * (room // 64 + 1))
    for layer in range(LAYERS):
        new = torch.randn(2, rows, KEY_HEADS, length, HEAD_DIM, dtype=torch.bfloat16)
        cache.update(*new, layer)
    return cache


def token(model, cache, rows: int) -> Callable[[], None]:
    """One step, which is then forgotten."""
    tokens = torch.full((rows, 1), 5)

    def call():
        with torch.no_grad():
            model(tokens, past_key_values=cache, logits_to_keep=1)
        cache.crop(-1)

    return call


def milliseconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def in_turns(calls: dict, seconds: float) -> dict[object, list[float]]:
    """Milliseconds of each call; the first round warms up."""
    spent = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            spent[name].append(milliseconds(call))
    return {name: times[1:] for name, times in spent.items()}


def contexts() -> None:
    ways = [("eager", "dynamic"), ("bf16", "dynamic"), ("bf16", "static"), ("bf16", "paged"), ("int4", "dynamic"),
            ("int4", "static")]  # fmt: skip
    print("| rows x tokens before | " + " | ".join(f"{model}, {cache}" for model, cache in ways) + " |")
    print("|---" * (len(ways) + 1) + "|")
    made = models()
    for rows, length in CONTEXTS:
        calls = {way: token(made[way[0]], cache_of(way[1], rows, length), rows) for way in ways}
        times = in_turns(calls, SECONDS)
        cells = []
        for taken in times.values():
            ratio = statistics.median(a / b for a, b in zip(times[ways[0]], taken, strict=True))
            cells.append(f"{statistics.median(taken):.2f} (**{ratio:.2f}x**)")
        print(f"| {rows} x {length} | {' | '.join(cells)} |", flush=True)


def parts() -> None:
    """Each part gives a constant instead of what it computes; what the token takes less is what the part took."""
    model = models()["int4"]
    call = token(model, cache_of("static", 1, 64), 1)
    zeros = {n: torch.zeros(1, 1, n, dtype=torch.bfloat16) for n in (128, 512, 1408, 8192)}
    heads = torch.zeros(1, 1, 8, HEAD_DIM, dtype=torch.bfloat16)

    def update(layer, key, value):
        layer.places += 1
        return CachedStates.of(layer, "keys"), value

    stand_ins = {
        "quantized_linear, 56": (nn.QuantizedLinear, "forward", lambda self, x: zeros[self._shape[0]]),
        "lm_head in bf16": (model.lm_head, "forward", lambda x: zeros[8192]),
        "rms_norm, 17": (norms._StructuralRMSNorm, "__call__", lambda self, module, input, backend: input),
        "swiglu, 8": (gated, "gated", lambda gate, *rest: gate),
        "rope, 8": (rotary.functional, "rope", lambda q, k, *rest, **options: (q, k)),
        "attention, 8": (StaticLayer, "attend", lambda *args, **options: heads),
        "append, 8": (StaticLayer, "update", update),
    }
    levels = ["all", *reversed(stand_ins)]
    times: dict[str, list[float]] = {name: [] for name in levels}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        with contextlib.ExitStack() as stack:
            for name in levels:
                if name in stand_ins:
                    stack.enter_context(mock.patch.object(stand_ins[name][0], *stand_ins[name][1:]))
                call()  # the first one with a stand-in is not what is timed
                times[name].append(milliseconds(call))
    took = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
    print(f"all: {took['all']:.0f} us")
    for before, name in itertools.pairwise(levels):
        print(f"{name}: {took[before] - took[name]:.0f} us")
    print(f"the rest, of transformers and torch: {took[levels[-1]]:.0f} us")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(machine.facts(), transformers.__version__)
    parts() if "parts" in sys.argv[1:] else contexts()
