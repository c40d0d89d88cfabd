"""Wrong forwards of recurrent layers, LSTM and GRU alike, and the check that accelerate refuses them."""

from collections.abc import Callable

from torch.nn.utils import rnn

import llmkernels
from llmkernels.accelerate.candidate import Candidate, user_rules


def lengths_ignored(run: Callable) -> Callable:
    def altered(module, input, hx=None, *, backend=None):
        if not isinstance(input, rnn.PackedSequence):
            return run(module, input, hx, backend="torch")
        padded, lengths = rnn.pad_packed_sequence(input)
        output, ends = run(module, padded, hx, backend="torch")
        return rnn.pack_padded_sequence(output, lengths, enforce_sorted=False), ends

    return altered


def without_dropout(run: Callable) -> Callable:
    def altered(module, input, hx=None, *, backend=None):
        was, module.dropout = module.dropout, 0.0
        try:
            return run(module, input, hx, backend="torch")
        finally:
            module.dropout = was

    return altered


def assert_verified(layer: type, op: str, run: Callable, options: tuple, wrong: str | None) -> None:
    """A candidate of `layer` is kept if nothing is `wrong` with it, else refused."""
    user_rules[layer] = lambda module: [Candidate(op, "candidate", (module.input_size,), run, *options)]
    try:
        module = layer(8, 12, 2, dropout=0.3, bidirectional=True)
        report = llmkernels.accelerate(module, backend="torch")
    finally:
        del user_rules[layer]
    if wrong is None:
        assert report.swapped, str(report)
    else:
        assert "candidate disagrees" in report.kept[0].detail and type(module) is layer
