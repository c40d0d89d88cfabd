"""A LLaMA-style model trains briefly on Python, and generates in fp32, bf16, int8 and int4.

Hugging Face's Llama from a config: RMSNorm, rotary embedding, grouped key heads, a gated MLP, over bytes.
`llmkernels.accelerate` finds these by their structure; `llmkernels.quantize` makes the linear layers int8 or int4, and
`llmkernels.generate` is the loop around them. For each: bytes per second, size of the weights, bits per byte of
held-out text.
"""

import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkernels
from common import Study, main, size
from hugging_face import transformers
from llmkernels.demo.text import batch, read, split

BATCH, LENGTH, GENERATED = 4, 128, 48
PROMPT = b"import os\nimport sys\n\ndef "


def make() -> nn.Module:
    config = transformers().LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=2 * LENGTH, tie_word_embeddings=False, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers().LlamaForCausalLM(config)


def loss(run, tokens: Tensor, targets: Tensor) -> Tensor:
    logits = run.model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, data: Tensor, device: str) -> float:
    total = 0.0
    for step in range(4):
        tokens, targets = (part.to(device) for part in batch(data, step, BATCH, LENGTH, seed=9))
        logits = model.eval()(input_ids=tokens, use_cache=False).logits.float()
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    return total / 4 / math.log(2)


def generate(model: nn.Module, device: str) -> bytes:
    """By transformers' own loop."""
    prompt = torch.tensor([list(PROMPT)], device=device)
    model.eval()
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=GENERATED, do_sample=False)
    return bytes(found[0].tolist())


def generate_fast(model: nn.Module, device: str) -> bytes:
    prompt = torch.tensor([list(PROMPT)], device=device)
    return bytes(llmkernels.generate(model.eval(), prompt, max_new_tokens=GENERATED)[0].tolist())


def run(args, console) -> int:
    train, held = split(read(args.text))
    study = Study("llama_chat_decode", args, console, make().to(args.device))
    tokens = lambda step: batch(train, step, BATCH, LENGTH, seed=args.seed)
    study.train(tokens, loss, items=BATCH * LENGTH, unit="bytes", rate=1e-3,
                slower="matrix products, which are torch's in both, are nearly all of it")  # fmt: skip
    bits = lambda model: bits_per_byte(model, held, args.device)
    write = lambda model: generate(model, args.device)
    write_fast = lambda model: generate_fast(model, args.device)
    study.value("held-out bits per byte, fp32", "bits", bits)
    texts = [write(study.undone()), write_fast(study.fast)]
    study.facts["same_text"] = texts[0] == texts[1]
    study.time("generation, fp32", "bytes", GENERATED, lambda: write(study.plain), lambda: write_fast(study.fast))

    half = copy.deepcopy(study.plain).bfloat16()
    fast = copy.deepcopy(half)
    llmkernels.accelerate(fast)
    study.time("generation, bf16", "bytes", GENERATED, lambda: write(half), lambda: write_fast(fast))
    half_bits, half_size = bits(half), size(half)
    study.compare("held-out bits per byte, bf16", "bits", half_bits, bits(fast))
    for scheme in ("int8", "int4"):
        small = copy.deepcopy(fast)
        report = llmkernels.quantize(small, scheme)
        console.print(str(report).splitlines()[0], markup=False)
        name = f"bf16 and {scheme}"
        study.time(f"generation, {name}", "bytes", GENERATED, lambda: write(half),
                   lambda small=small: write_fast(small))  # fmt: skip
        study.compare(f"held-out bits per byte, {name}", "bits", half_bits, bits(small))
        study.compare(f"weights, {name}", "MB", half_size, size(small), smaller=True)
    console.print(texts[1].decode("utf-8", "replace"), markup=False, highlight=False)
    return max(study.finish(), 0 if study.facts["same_text"] else 1)


if __name__ == "__main__":
    sys.exit(main(run, __doc__, steps=60))
