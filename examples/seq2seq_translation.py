"""An encoder and a decoder learn to write dates and numbers out in words, and to read them back.

Tasks with checkable answers: "1994-03-17" <-> "march seventeenth nineteen ninety-four", "40721" <-> "forty thousand
seven hundred twenty-one", character by character. Both halves are layers of multi-head attention, norms and
feed-forward; the decoder attends to what the encoder made of the question. Answers are found greedily and by beam
search. `llmkernels.accelerate` swaps norms and attention.
"""

import random
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Run, Study, main
from llmkernels.cli import UsageError

WIDTH, HEADS, LAYERS, LONGEST, BATCH = 128, 4, 2, 72, 64
QUESTIONS, TIMED = 96, 8
ALPHABET = " -0123456789abcdefghijklmnopqrstuvwxyz<>"  # < and > ask for digits and for words
PAD, START, END = range(3)
UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
UNITS += "seventeen eighteen nineteen".split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
MONTHS = "january february march april may june july august september october november december".split()
ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
            "twelve": "twelfth"}  # fmt: skip


def words(number: int) -> str:
    """0 to 999,999 in words."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        return TENS[number // 10] + (f"-{UNITS[number % 10]}" if number % 10 else "")
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = f" {words(number % size)}" if number % size else ""
            return f"{words(number // size)} {name}{rest}"
    raise AssertionError(number)


def ordinal(number: int) -> str:
    """1 to 31 as a day of a month."""
    head, _, last = words(number).rpartition("-")
    last = ORDINALS.get(last) or (last[:-1] + "ie" if last.endswith("y") else last) + "th"
    return f"{head}-{last}" if head else last


def pair(generator: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    if generator.random() < 0.5:
        number = generator.randrange(10 ** generator.randint(1, 6))
        digits, text = str(number), words(number)
    else:
        year, month, day = generator.randint(1900, 1999), generator.randint(1, 12), generator.randint(1, 28)
        digits = f"{year}-{month:02}-{day:02}"
        rest = "hundred" if year == 1900 else words(year - 1900)
        text = f"{MONTHS[month - 1]} {ordinal(day)} nineteen {rest}"
    return (">" + digits, text) if generator.random() < 0.5 else ("<" + text, digits)


def encode(texts: list[str], *, ends: bool) -> Tensor:
    """Token numbers `[len(texts), longest]`, padded; with `ends` between START and END."""
    rows = [[3 + ALPHABET.index(letter) for letter in text] for text in texts]
    rows = [[START, *row, END] for row in rows] if ends else rows
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def decode(row: list[int]) -> str:
    row = row[: row.index(END)] if END in row else row
    return "".join(ALPHABET[token - 3] for token in row if token > END)


def examples(seed: int, count: int) -> tuple[list[str], list[str]]:
    generator = random.Random(seed)
    pairs = [pair(generator) for _ in range(count)]
    return [question for question, _ in pairs], [answer for _, answer in pairs]


class Layer(nn.Module):
    """Attention to itself, attention to the encoder if there is one, feed-forward; each after a norm."""

    def __init__(self, *, cross: bool):
        super().__init__()
        self.itself = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) if cross else None
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3 if cross else 2))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, padding: Tensor | None, mask: Tensor | None = None, memory=None) -> Tensor:
        y = self.norms[0](x)
        x = x + self.itself(y, y, y, padding, attn_mask=mask, is_causal=mask is not None, need_weights=False)[0]
        if self.cross is not None:
            y = self.norms[1](x)
            x = x + self.cross(y, memory[0], memory[0], memory[1], need_weights=False)[0]
        return x + self.down(F.relu(self.up(self.norms[-1](x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        size = len(ALPHABET) + 3
        self.letters, self.places = nn.Embedding(size, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.encoder = nn.ModuleList(Layer(cross=False) for _ in range(LAYERS))
        self.decoder = nn.ModuleList(Layer(cross=True) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, size)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.letters(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))

    def read(self, questions: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder attends to, and where it is padding."""
        x, padding = self.embed(questions), questions == PAD
        for layer in self.encoder:
            x = layer(x, padding)
        return self.norms[0](x), padding

    def write(self, answers: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        """Logits of the letter after each of `answers` `[B, S]`."""
        length = answers.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=answers.device).triu(1)
        x = self.embed(answers)
        for layer in self.decoder:
            x = layer(x, None, mask, memory)
        return self.head(self.norms[1](x))


def loss(run: Run, questions: Tensor, answers: Tensor) -> Tensor:
    logits = run.model.write(answers[:, :-1], run.model.read(questions))
    return F.cross_entropy(logits.flatten(0, 1), answers[:, 1:].flatten(), ignore_index=PAD)


def greedy(model: Model, questions: Tensor) -> list[str]:
    """The likeliest next letter, until every answer has ended."""
    memory = model.read(questions)
    answers = torch.full((len(questions), 1), START, device=questions.device)
    while answers.shape[1] < LONGEST and not bool((answers == END).any(1).all()):
        answers = torch.cat((answers, model.write(answers, memory)[:, -1].argmax(-1, keepdim=True)), 1)
    return [decode(row) for row in answers.tolist()]


def beam(model: Model, questions: Tensor, width: int = 3) -> list[str]:
    """The likeliest of `width` answers that are kept at every letter."""
    count = len(questions)
    memory = tuple(part.repeat_interleave(width, 0) for part in model.read(questions))
    answers = torch.full((count * width, 1), START, device=questions.device)
    scores = torch.full((count, width), -torch.inf, device=questions.device)
    scores[:, 0] = 0.0
    while answers.shape[1] < LONGEST and not bool((answers == END).any(1).all()):
        next_letter = model.write(answers, memory)[:, -1].log_softmax(-1)
        ended = (answers == END).any(1)
        next_letter[ended] = -torch.inf
        next_letter[ended, PAD] = 0.0  # an answer that has ended stays as it is
        total = scores[..., None] + next_letter.view(count, width, -1)
        scores, chosen = total.flatten(1).topk(width)
        letters = next_letter.shape[-1]
        parents = chosen // letters + torch.arange(count, device=chosen.device)[:, None] * width
        answers = torch.cat((answers[parents.flatten()], (chosen % letters).view(-1, 1)), 1)
    return [decode(row) for row in answers[::width].tolist()]


def run(args, console) -> int:
    if args.text is not None:
        raise UsageError("--text: this example makes its own questions, expected none")
    if args.questions < 1:
        raise UsageError(f"--questions is {args.questions}, expected at least 1")

    def batch(step: int) -> tuple[Tensor, Tensor]:
        questions, answers = examples(args.seed * 1_000_003 + step, BATCH)
        return encode(questions, ends=False), encode(answers, ends=True)

    study = Study("seq2seq_translation", args, console, Model().to(args.device))
    study.train(batch, loss, items=BATCH, unit="answers", rate=2e-3)
    asked, expected = examples(-1, args.questions)
    questions = encode(asked, ends=False).to(args.device)
    study.facts["same_answers"], undone = True, study.undone()
    for name, search in (("greedy", greedy), ("beam", beam)):
        with torch.no_grad():
            answers = {model: search(model.eval(), questions) for model in (study.plain, study.fast, undone)}
        study.facts["same_answers"] &= answers[undone] == answers[study.fast]
        right = lambda model, answers=answers: sum(map(str.__eq__, answers[model], expected)) / len(expected)
        study.value(f"exact answers, {name}", "share", right)
        some = questions[:TIMED]
        answer = lambda model, search=search, some=some: search(model, some)
        study.time(f"answering, {name}", "answers", len(some), lambda answer=answer: answer(study.plain),
                   lambda answer=answer: answer(study.fast))  # fmt: skip
    for question, answer in list(zip(asked, answers[study.fast], strict=True))[:4]:
        console.print(f"  {question[1:]} -> {answer}", markup=False, highlight=False)
    return max(study.finish(), 0 if study.facts["same_answers"] else 1)


def add_arguments(parser) -> None:
    parser.add_argument("--questions", type=int, default=QUESTIONS, help=f"to answer at the end (default {QUESTIONS})")


if __name__ == "__main__":
    sys.exit(main(run, __doc__, steps=400, add_arguments=add_arguments))
