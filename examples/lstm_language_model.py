"""An LSTM learns to write Python, byte by byte, with truncated backpropagation through time and carried state.

Embedding, two layers of LSTM, a linear head. The text is read as parallel streams: each batch goes on where the last
one ended, with the state of the LSTM handed on, and cut off from its past. Then text is sampled one byte at a time, the
state handed from byte to byte.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Run, Study, main
from llmkernels.demo.text import read, split

STREAMS, LENGTH, WIDTH = 16, 64, 256


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.bytes = nn.Embedding(256, 128)
        self.lstm = nn.LSTM(128, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor, state=None):
        output, state = self.lstm(self.bytes(tokens), state)
        return self.head(output), state


def streams(data: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Input and target `[STREAMS, LENGTH]` of a step; past the end of the text the streams begin again."""
    rows = data[: len(data) // STREAMS * STREAMS].view(STREAMS, -1)
    begin = step * LENGTH % (rows.shape[1] - LENGTH - 1)
    part = rows[:, begin : begin + LENGTH + 1].long()
    return part[:, :-1], part[:, 1:]


def loss(run: Run, tokens: Tensor, targets: Tensor) -> Tensor:
    logits, state = run.model(tokens, run.memory.get("state"))
    run.memory["state"] = tuple(part.detach() for part in state)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def held_out(model: Model, data: Tensor, device: str) -> tuple[float, float]:
    """(loss in nats, share of bytes that are foretold) of ten batches, with the state carried along."""
    state, losses, right = None, [], []
    for step in range(10):
        tokens, targets = (part.to(device) for part in streams(data, step))
        logits, state = model(tokens, state)
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
        right.append((logits.argmax(-1) == targets).float().mean())
    return float(sum(losses)) / 10, float(sum(right)) / 10


def sample(model: Model, prompt: bytes, count: int, device: str) -> bytes:
    """`prompt` continued by `count` bytes at temperature 0.7, one at a time."""
    generator = torch.Generator().manual_seed(0)
    text, state, unread = list(prompt), None, torch.tensor([list(prompt)], device=device)
    for _ in range(count):
        logits, state = model(unread, state)
        text.append(int(torch.multinomial((logits[0, -1].cpu() / 0.7).softmax(0), 1, generator=generator)))
        unread = torch.tensor([text[-1:]], device=device)
    return bytes(text)


def run(args, console) -> int:
    train, held = split(read(args.text))
    study = Study("lstm_language_model", args, console, Model().to(args.device))
    study.train(lambda step: streams(train, step), loss, items=STREAMS * LENGTH, unit="bytes", rate=3e-3)
    study.value("held-out loss", "nats", lambda model: held_out(model, held, args.device)[0])
    study.value("held-out accuracy", "share", lambda model: held_out(model, held, args.device)[1])
    generate = lambda model: sample(model.eval(), b"def ", 100, args.device)
    study.time("sampling, stateful", "bytes", 100, lambda: generate(study.plain), lambda: generate(study.fast))
    console.print("asked to continue 'def ':", style="bold")
    with torch.no_grad():
        console.print(generate(study.fast).decode("utf-8", "replace"), markup=False, highlight=False)
    return study.finish()


if __name__ == "__main__":
    sys.exit(main(run, __doc__, steps=200))
