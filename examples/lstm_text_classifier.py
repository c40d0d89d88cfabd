"""An LSTM tells from which module of Python's standard library a few lines of code come.

Embedding of 50, LSTM of 64, softmax, with dropout of the embedding and of the recurrent weights (DropConnect). The
pieces have different lengths and go through the LSTM packed, so that no padding is computed. In PyTorch the recurrent
weights are dropped by hand; with llmkernels that is an option of `nn.LSTM`, which takes the same state_dict.
"""

import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import llmkernels
from common import Run, Study, main
from llmkernels.cli import UsageError
from llmkernels.demo.text import read
from tokens import BytePairs

MODULES = ("argparse", "ast", "datetime", "decimal", "inspect", "pathlib", "tarfile", "turtle", "typing", "zipfile")
OTHER_NAMES = {"decimal": "_pydecimal", "datetime": "_pydatetime", "pathlib": "pathlib/__init__",
               "zipfile": "zipfile/__init__"}  # fmt: skip
VOCABULARY, LONGEST, BATCH, LINES = 1024, 48, 64, 3
EMBEDDING, HIDDEN, DROPOUT, RECURRENT_DROPOUT = 50, 64, 0.2, 0.2


def source(name: str) -> bytes:
    """The code of a module, which in some versions of Python lies in another file."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{OTHER_NAMES.get(name, name)}.py", folder / f"{name}.py"]
    return next(path.read_bytes() for path in files if path.exists())


class Pieces:
    """Tokens `[n, LONGEST]`, lengths and labels of pieces of code, in random order; a fifth is held out."""

    def __init__(self, texts: list[bytes], pairs: BytePairs, seed: int):
        rows, labels = [], []
        for label, text in enumerate(texts):
            lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 10]
            for begin in range(0, len(lines) - LINES, LINES):
                rows.append(pairs.encode(b"\n".join(lines[begin : begin + LINES]))[:LONGEST])
                labels.append(label)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        self.tokens = torch.zeros(len(rows), LONGEST, dtype=torch.int64)
        for place, index in enumerate(order.tolist()):
            self.tokens[place, : len(rows[index])] = torch.tensor(rows[index])
        self.lengths = torch.tensor([len(row) for row in rows])[order]
        self.labels = torch.tensor(labels)[order]
        self.cut = len(rows) * 4 // 5

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(self.cut, (BATCH,), generator=generator)
        return self.tokens[chosen], self.lengths[chosen], self.labels[chosen]

    def held_out(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens[self.cut :], self.lengths[self.cut :], self.labels[self.cut :]


class Model(nn.Module):
    def __init__(self, labels: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, EMBEDDING)
        self.lstm = nn.LSTM(EMBEDDING, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, labels)

    def read(self, packed):
        """The last hidden state of each piece, with dropped recurrent weights in training."""
        dropped = {"weight_hh_l0": F.dropout(self.lstm.weight_hh_l0, RECURRENT_DROPOUT, self.training)}
        return torch.func.functional_call(self.lstm, dropped, (packed,))[1][0][-1]

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = F.dropout(self.embedding(tokens), DROPOUT, self.training)
        hidden = self.read(pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False))
        return self.head(F.dropout(hidden, DROPOUT, self.training))


class FastModel(Model):
    def read(self, packed):
        return self.lstm(packed)[1][0][-1]


def prepare(model: Model) -> str:
    lstm = llmkernels.nn.LSTM(EMBEDDING, HIDDEN, batch_first=True, recurrent_dropout=RECURRENT_DROPOUT)
    lstm.load_state_dict(model.lstm.state_dict())
    model.lstm = lstm.to(model.head.weight.device)
    model.__class__ = FastModel
    return "the LSTM is llmkernels.nn.LSTM, whose recurrent_dropout does what was done by hand"


def loss(run: Run, tokens: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(run.model(tokens, lengths), labels)


def run(args, console) -> int:
    if args.text is not None:
        parts = read(args.text)
        size = len(parts) // 4
        texts = [parts[index * size : (index + 1) * size] for index in range(4)]  # which quarter of the file
    else:
        texts = [source(name) for name in MODULES]
    pairs = BytePairs.train(b"\n".join(texts), VOCABULARY)
    pieces = Pieces(texts, pairs, args.seed)
    if pieces.cut < BATCH:
        raise UsageError(f"--text: {pieces.cut} pieces of {LINES} lines to learn from, expected at least {BATCH}")
    console.print(f"{len(pieces.labels):,} pieces of {LINES} lines from {len(texts)} modules")
    study = Study("lstm_text_classifier", args, console, Model(len(texts)).to(args.device), prepare)
    study.train(pieces.batch, loss, items=BATCH, unit="pieces", rate=2e-3)
    tokens, lengths, labels = (part.to(args.device) for part in pieces.held_out())
    accuracy = lambda model: (model(tokens, lengths).argmax(1) == labels).float().mean()
    study.value("held-out accuracy", "share", accuracy)
    study.facts["chance"] = float(labels.bincount().max() / len(labels))
    classify = lambda model: model.eval()(tokens[:256], lengths[:256])
    study.time("classifying", "pieces", 256, lambda: classify(study.plain), lambda: classify(study.fast))
    return study.finish()


if __name__ == "__main__":
    sys.exit(main(run, __doc__, steps=300))
