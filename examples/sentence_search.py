"""A sentence encoder finds the function that a question is about, among the docstrings of Python's standard library.

A BERT with mean pooling, as MiniLM and its kin are. Without --model it is made from a config and learns for a minute
that the first sentence of a docstring belongs to the rest of it; with a local folder it is what that folder has.
Answers are the docstrings nearest by cosine. `llmkernels.accelerate` swaps norms and attention, `llmkernels.quantize`
turns the linear layers to int8.
"""

import ast
import copy
import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkernels
from common import Study, main, size
from hugging_face import from_folder, transformers
from llmkernels.cli import UsageError
from llmkernels.demo.text import read
from tokens import BytePairs

VOCABULARY, LONGEST, BATCH, PAD, SCALE, SHORTEST = 1024, 48, 32, 0, 20.0, 60
QUESTIONS = ("compress data with gzip", "parse command line arguments", "the difference between two dates",
             "copy a file", "send an email", "read a csv file", "match a regular expression",
             "start a new thread")  # fmt: skip


def docstrings(code: str) -> list[str]:
    """The docstrings of functions and classes that are long enough to be found again."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(code)) if isinstance(node, kinds))
    texts = (" ".join(text.split()) for text in found if text)
    return [text for text in texts if len(text) >= SHORTEST and ". " in text]


def library() -> list[str]:
    """Those of the standard library's top level, in alphabetical order."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = [text for path in files for text in docstrings(path.read_text(errors="replace"))]
    return list(dict.fromkeys(found))


class Encoder(nn.Module):
    """Sentences as vectors of length one: the mean of the last layer's outputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    rows = [row[:LONGEST] for row in rows]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    return tokens, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


def make(args, texts: list[str]):
    """(encoder, function from a text to its tokens)."""
    if args.model is not None:
        model, tokenizer = from_folder(args.model, "AutoModel")
        return Encoder(model), lambda text: tokenizer(text)["input_ids"]
    config = transformers().BertConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1024,
        max_position_embeddings=LONGEST, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    pairs = BytePairs.train("\n".join(texts).encode(), VOCABULARY)
    return Encoder(transformers().BertModel(config)), lambda text: pairs.encode(text.lower().encode())


def loss(run, firsts: Tensor, first_mask: Tensor, rests: Tensor, rest_mask: Tensor) -> Tensor:
    """The first sentence of each docstring is nearer to its rest than to the others of the batch."""
    similar = SCALE * run.model(firsts, first_mask) @ run.model(rests, rest_mask).t()
    return F.cross_entropy(similar, torch.arange(len(similar), device=similar.device))


def run(args, console) -> int:
    if args.text is None:
        texts = library()
    else:
        try:
            texts = docstrings(read(args.text).decode(errors="replace"))
        except SyntaxError as error:
            raise UsageError(f"--text: {args.text} is not Python: {error.msg}, line {error.lineno}") from error
        if len(texts) < 2 * BATCH:
            raise UsageError(f"--text: {args.text} has {len(texts)} docstrings, expected at least {2 * BATCH}")
    encoder, encode = make(args, texts)
    study = Study("sentence_search", args, console, encoder.to(args.device))

    def batch(step: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = [texts[index] for index in torch.randperm(len(texts), generator=generator)[:BATCH].tolist()]
        halves = [text.split(". ", 1) for text in chosen]
        return *padded([encode(first) for first, _ in halves]), *padded([encode(rest) for _, rest in halves])

    if args.model is None:
        study.train(batch, loss, items=BATCH, unit="docstrings", rate=3e-4,
                    slower="matrix products, which are torch's in both, are nearly all of it")  # fmt: skip
    pages = [tuple(part.to(args.device) for part in padded([encode(text) for text in texts[at : at + 64]]))
             for at in range(0, len(texts), 64)]  # fmt: skip
    asked = tuple(part.to(args.device) for part in padded([encode(text) for text in QUESTIONS]))

    @torch.no_grad()
    def ranking(model: nn.Module) -> Tensor:
        """The five nearest docstrings of each question."""
        model.eval()
        everything = torch.cat([model(*page) for page in pages])
        return (model(*asked) @ everything.t()).topk(5).indices

    plain, fast = ranking(study.undone()), ranking(study.fast)
    study.facts["same_ranking"] = torch.equal(plain, fast)
    console.print(f"{len(texts):,} docstrings; the five nearest are "
                  f"{'the same' if study.facts['same_ranking'] else 'NOT the same'} in both")  # fmt: skip
    for query, nearest in zip(QUESTIONS, plain[:, 0].tolist(), strict=True):
        console.print(f"  {query} -> {texts[nearest][:90]}", markup=False, highlight=False)
    some = lambda model: model.eval()(*pages[0])
    study.time("embedding", "docstrings", len(pages[0][0]), lambda: some(study.plain), lambda: some(study.fast))
    kept = lambda found: float((found[:, :, None] == plain[:, None, :]).any(2).float().mean())
    for scheme, name in (("int8", "int8"), ("w8a8", "W8A8")):
        small = copy.deepcopy(study.fast).eval()
        report = llmkernels.quantize(small, scheme)
        found = ranking(small)
        study.compare(f"of the five nearest in fp32, found with {name}", "share", 1.0, kept(found))
        study.facts[f"same_nearest_{scheme}"] = torch.equal(found[:, 0], plain[:, 0])
    console.print(report)
    study.compare("weights, fp32 and W8A8", "MB", size(study.plain), size(small), smaller=True)
    study.time("embedding, fp32 and W8A8", "docstrings", len(pages[0][0]), lambda: some(study.plain),
               lambda: some(small))  # fmt: skip
    return max(study.finish(), 0 if study.facts["same_ranking"] else 1)


def add_arguments(parser) -> None:
    parser.add_argument("--model", type=Path, help="a local folder with an encoder; default: a small one, trained here")


if __name__ == "__main__":
    sys.exit(main(run, __doc__, steps=80, add_arguments=add_arguments))
