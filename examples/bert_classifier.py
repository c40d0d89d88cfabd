"""BERT learns to sort customers' questions into intents, and does so again in int8.

The model is Hugging Face's, made from a config, or read from a local folder with --model. The labelled questions are
made from templates, with words left out, doubled and misspelt: this example says so, and its accuracy is about them.
`llmkernels.accelerate` swaps norms and attention; `llmkernels.quantize` then turns the linear layers to int8.
"""

import copy
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkernels
from common import Study, main, size
from hugging_face import from_folder, transformers
from llmkernels.cli import UsageError
from tokens import BytePairs

VOCABULARY, LONGEST, BATCH, PAD = 512, 32, 32, 0
THINGS = "order parcel shoes laptop book coat lamp invoice bike phone".split()
TEMPLATES = {
    "delivery": ["where is my {thing}", "when will the {thing} arrive", "my {thing} has not been delivered yet"],
    "return": ["i want to send the {thing} back", "how do i return a {thing}", "the {thing} does not fit me"],
    "refund": ["when do i get my money back for the {thing}", "please refund the {thing}", "i was charged twice"],
    "cancel": ["cancel my {thing} please", "i do not want the {thing} any more", "stop the order of the {thing}"],
    "broken": ["the {thing} arrived broken", "my {thing} does not work", "there is a crack in the {thing}"],
    "account": ["i cannot log in", "how do i change my password", "my account for the {thing} is locked"],
    "price": ["how much is the {thing}", "is there a discount on the {thing}", "what does shipping a {thing} cost"],
    "stock": ["do you have the {thing} in blue", "is the {thing} in stock", "when will the {thing} be available again"],
}
INTENTS = list(TEMPLATES)


def question(generator: random.Random) -> tuple[str, int]:
    """A noisy question and the number of its intent."""
    label = generator.randrange(len(INTENTS))
    words = generator.choice(TEMPLATES[INTENTS[label]]).format(thing=generator.choice(THINGS)).split()
    words = [word for word in words if generator.random() > 0.08] or words
    for _ in range(2):
        at = generator.randrange(len(words))
        word = words[at]
        if len(word) > 3 and generator.random() < 0.5:  # two letters change places
            cut = generator.randrange(len(word) - 1)
            words[at] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    greeting = generator.choice(["", "hello ", "hi there ", "good morning ", "excuse me "])
    return greeting + " ".join(words) + generator.choice(["", "?", " thanks", " please help"]), label


class Questions:
    """Padded tokens, their mask and labels, of questions that are made on demand."""

    def __init__(self, encode):
        self.encode = encode

    def __call__(self, seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = random.Random(seed)
        pairs = [question(generator) for _ in range(count)]
        rows = [self.encode(text)[:LONGEST] for text, _ in pairs]
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return tokens, mask, torch.tensor([label for _, label in pairs])


def make(args) -> tuple[nn.Module, Questions]:
    """A model with a head for the intents, and questions in its tokens."""
    if args.model is not None:
        model, tokenizer = from_folder(args.model, "AutoModelForSequenceClassification", num_labels=len(INTENTS))
        return model, Questions(lambda text: tokenizer(text)["input_ids"])
    config = transformers().BertConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=LONGEST, num_labels=len(INTENTS), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    generator = random.Random(1)
    text = "\n".join(question(generator)[0] for _ in range(2000)).encode()
    pairs = BytePairs.train(text, VOCABULARY)
    return transformers().BertForSequenceClassification(config), Questions(lambda text: pairs.encode(text.encode()))


def run(args, console) -> int:
    if args.text is not None:
        raise UsageError("--text: this example makes its own questions, expected none")
    model, questions = make(args)
    study = Study("bert_classifier", args, console, model.to(args.device))
    console.print("the questions are made from templates, with noise: no customer ever asked them")
    batch = lambda step: questions(args.seed * 1_000_003 + step, BATCH)
    loss = lambda run, tokens, mask, labels: F.cross_entropy(run.model(tokens, attention_mask=mask).logits, labels)
    study.train(batch, loss, items=BATCH, unit="questions", rate=1e-3,
                slower="matrix products, which are torch's in both, are nearly all of it")  # fmt: skip
    tokens, mask, labels = (part.to(args.device) for part in questions(-1, 256))
    answer = lambda model: model(tokens, attention_mask=mask).logits.argmax(-1)
    right = lambda model: float((answer(model) == labels).float().mean())
    study.value("held-out accuracy", "share", right)
    study.time("sorting", "questions", len(labels), lambda: answer(study.plain), lambda: answer(study.fast))
    small = copy.deepcopy(study.fast).eval()
    console.print(llmkernels.quantize(small, "w8a8"))
    with torch.no_grad():
        study.compare("held-out accuracy, fp32 and W8A8", "share", right(study.plain), right(small))
    study.compare("weights, fp32 and W8A8", "MB", size(study.plain), size(small), smaller=True)
    study.time("sorting, fp32 and W8A8", "questions", len(labels), lambda: answer(study.plain), lambda: answer(small))
    return study.finish()


def add_arguments(parser) -> None:
    parser.add_argument("--model", type=Path, help="a local folder with a BERT; default: a small one from a config")


if __name__ == "__main__":
    sys.exit(main(run, __doc__, steps=100, add_arguments=add_arguments))
