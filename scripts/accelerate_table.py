"""The table of docs/accelerate.md: models before and after accelerate(), in turns, one thread.

python scripts/accelerate_table.py        # needs transformers; models are made from configs
"""

import statistics
import time
from collections.abc import Callable

import torch
import transformers

import llmkernels
from llmkernels import machine

PAIRS = 11
LLAMA = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
BERT = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
        "num_attention_heads": 12}  # fmt: skip
MODELS = {
    "Llama, 8 x 512": ("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA), 512),
    "Gemma 2, 8 x 512": (
        "Gemma2ForCausalLM", transformers.Gemma2Config(**LLAMA, head_dim=64, query_pre_attn_scalar=64), 512,
    ),
    "GPT-2, 8 x 512": (
        "GPT2LMHeadModel", transformers.GPT2Config(vocab_size=8192, n_embd=512, n_layer=8, n_head=8), 512,
    ),
    "MiniLM (BERT, 6 x 384)": ("BertModel", transformers.BertConfig(**BERT), 256),
}  # fmt: skip


def median_pair(before: Callable, after: Callable) -> tuple[float, float, float]:
    """Milliseconds of both, and the median of the ratios of calls in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(PAIRS + 1):
        for call, spent in zip((before, after), times, strict=True):
            start = time.perf_counter()
            call()
            spent.append(1e3 * (time.perf_counter() - start))
    pairs = list(zip(*times, strict=True))[1:]  # the first warms up
    return *(statistics.median(column) for column in zip(*pairs, strict=True)), statistics.median(
        a / b for a, b in pairs
    )


def calls(model, ids: torch.Tensor) -> dict[str, Callable]:
    """What is timed: a prompt, a training step, one token with a cache of the prompt."""

    def prompt():
        with torch.no_grad():
            model.eval()(ids, **({"use_cache": False} if has_loss else {}))

    def step():
        output = model.train()(ids, labels=ids, use_cache=False) if has_loss else model.train()(ids)
        (output.loss if has_loss else output.last_hidden_state.float().square().mean()).backward()
        model.zero_grad()

    def generate():
        with torch.no_grad():
            model.eval().generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)

    has_loss = model.get_output_embeddings() is not None
    found = {f"forward, {ids.shape[1]} tokens": prompt, "forward and backward": step}
    return found | ({"generate 32 tokens": generate} if has_loss else {})


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    facts = machine.facts()
    print(facts, transformers.__version__)
    print("| model | | dtype | before, ms | after, ms | ratio |\n|---|---|---|---|---|---|")
    for name, (kind, config, length) in MODELS.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            plain = getattr(transformers, kind)(config).to(dtype)
            fast = llmkernels.accelerate(plain, inplace=False).model
            ids = torch.randint(3, config.vocab_size, (1, length))
            for what, before in calls(plain, ids).items():
                old, new, ratio = median_pair(before, calls(fast, ids)[what])
                short = str(dtype).removeprefix("torch.")
                print(f"| {name} | {what} | {short} | {old:.1f} | {new:.1f} | **{ratio:.2f}x** |", flush=True)


if __name__ == "__main__":
    main()
