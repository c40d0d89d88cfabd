"""What `accelerate` did, module by module, and why not where it did nothing."""

import html
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from torch import nn

from llmkernels import _html
from llmkernels.quantization.report import Report as QuantizationReport
from llmkernels.quantization.report import bytes_text

COLUMNS = ("module", "from", "to", "backend", "error", "speed", "why not")


@dataclass(frozen=True)
class Entry:
    """One module, or one thing of a module.

    `detail` says what runs instead or why nothing does; `error` is the largest relative error of a row seen in
    verification, None if nothing was run; `speed` how many times as fast it was, None if that was not measured.
    """

    path: str
    module: str
    swapped: bool
    detail: str
    error: float | None = None
    replacement: str | None = None
    backend: str | None = None
    speed: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of parameters and buffers, before and after, and of tensors kept for `restore`."""

    before: int
    after: int
    kept: int

    def __str__(self) -> str:
        changed = f" -> {bytes_text(self.after)}" if self.after != self.before else ", as before"
        kept = f", and {bytes_text(self.kept)} kept for restore" if self.kept else ""
        return f"{bytes_text(self.before)} of parameters and buffers{changed}{kept}"


@dataclass
class Report:
    """Prints as a table, in a notebook too; `entries` has one line for all that was recognised.

    `model` is the model that is accelerated: the one that was given, or with `inplace=False` its copy. `whole` says how
    the whole model compared on the example inputs, if there were any. `dtype` is what it was cast to, `quantization`
    the report of its layers; `lost` how far outputs are then off what they were, relative to their size, as norms:
    {"bfloat16": 0.004, "int4": 0.08}, the latter with both.
    """

    entries: list[Entry] = field(default_factory=list)
    model: nn.Module | None = field(default=None, repr=False, compare=False)
    whole: str | None = None
    dtype: str | None = None
    quantization: QuantizationReport | None = None
    lost: dict[str, float | None] = field(default_factory=dict)
    memory: Memory | None = None

    @property
    def swapped(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.swapped]

    @property
    def kept(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.swapped]

    def to_dict(self) -> dict:
        """What there is in plain Python values."""
        entries = [asdict(entry) for entry in self.entries]
        for entry in entries:
            entry["error"] = _number(entry["error"])  # the reason says what it was
        return {
            "swapped": len(self.swapped),
            "kept": len(self.kept),
            "whole": self.whole,
            "dtype": self.dtype,
            "lost": {name: _number(error) for name, error in self.lost.items()},
            "memory": None if self.memory is None else asdict(self.memory),
            "entries": entries,
            "quantization": None if self.quantization is None else self.quantization.to_dict(),
        }

    def to_json(self, **options) -> str:
        """`to_dict()` as JSON; options as those of json.dumps."""
        return json.dumps(self.to_dict(), **options)

    def lines(self) -> list[tuple[str, ...]]:
        """The rows of the table, in COLUMNS: modules of one class with one outcome share a line."""
        groups: dict[tuple, list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((entry.module, entry.swapped, entry.detail), []).append(entry)
        return [_line(entries) for entries in groups.values()]

    def head(self) -> str:
        """One line: the totals."""
        counts = Counter("swapped" if entry.swapped else "kept" for entry in self.entries)
        return f"accelerate: {counts['swapped']} swapped, {counts['kept']} kept as they were"

    def tail(self) -> list[str]:
        """What is said of the whole model, line by line."""
        found = [] if self.whole is None else [f"whole model: {self.whole}"]
        if self.lost:
            errors = (f"in {name} {'no output' if e is None else f'{e:.1e}'}" for name, e in self.lost.items())
            found.append(f"outputs are off by, of their size: {', '.join(errors)}")
        if self.dtype is not None:
            found.append(f"dtype: {self.dtype}")
        return found + ([] if self.memory is None else [f"memory: {self.memory}"])

    def __str__(self) -> str:
        lines = self.lines()
        used = _used(lines)
        rows = [tuple(COLUMNS[i] for i in used), *(tuple(line[i] for i in used) for line in lines)] if lines else []
        widths = [max(len(row[i]) for row in rows) for i in range(len(used))] if rows else []
        table = ("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        layers = [] if self.quantization is None else [str(self.quantization)]
        return "\n".join((self.head(), *table, *layers, *self.tail()))

    def __rich__(self):
        from rich.console import Group

        layers = [] if self.quantization is None else [self.quantization]
        return Group(self._rich_table(), *layers, *self.tail())

    def _rich_table(self):
        from rich.table import Table

        lines = self.lines()
        used = _used(lines)
        table = Table(title=self.head())
        for i in used:
            table.add_column(COLUMNS[i], overflow="fold")
        for line in lines:
            table.add_row(*(line[i] for i in used))
        return table

    def _repr_html_(self) -> str:
        lines = self.lines()
        used = _used(lines)
        table = _html.table(self.head(), [COLUMNS[i] for i in used], ([line[i] for i in used] for line in lines))
        layers = "" if self.quantization is None else self.quantization._repr_html_()
        return table + layers + "".join(f"<p>{html.escape(line)}</p>" for line in self.tail())


def _number(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None


def _line(entries: list[Entry]) -> tuple[str, ...]:
    first = entries[0]
    where = first.path or "(the model itself)"
    where = where if len(entries) == 1 else f"{where} and {len(entries) - 1} more"
    largest = _text(max, (entry.error for entry in entries), "{:.0e}") if first.swapped else ""
    slowest = _text(min, (entry.speed for entry in entries), "{:.2f}x")
    to = (first.replacement or first.detail) if first.swapped else "-"
    return where, first.module, to, first.backend or "", largest, slowest, "" if first.swapped else first.detail


def _text(choose, values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(choose(known)) if known else ""


def _used(lines: list[tuple[str, ...]]) -> list[int]:
    """The columns in which something stands."""
    return [i for i in range(len(COLUMNS)) if i < 3 or any(line[i] for line in lines)]
