"""What `accelerate` did, module by module, and why not where it did nothing."""

import html
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from torch import nn

from llmkernels import _html

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


@dataclass
class Report:
    """Prints as a table, in a notebook too; `entries` has one line for all that was recognised.

    `model` is the model that is accelerated: the one that was given, or with `inplace=False` its copy. `whole` says how
    the whole model compared on the example inputs, if there were any.
    """

    entries: list[Entry] = field(default_factory=list)
    model: nn.Module | None = field(default=None, repr=False, compare=False)
    whole: str | None = None

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
            if entry["error"] is not None and not math.isfinite(entry["error"]):
                entry["error"] = None  # JSON has no such number; the reason says what it was
        return {"swapped": len(self.swapped), "kept": len(self.kept), "whole": self.whole, "entries": entries}

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

    def tail(self) -> str | None:
        """One line: the whole model, if it was compared."""
        return None if self.whole is None else f"whole model: {self.whole}"

    def __str__(self) -> str:
        lines = self.lines()
        used = _used(lines)
        rows = [tuple(COLUMNS[i] for i in used), *(tuple(line[i] for i in used) for line in lines)] if lines else []
        widths = [max(len(row[i]) for row in rows) for i in range(len(used))] if rows else []
        table = ("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(filter(None, (self.head(), *table, self.tail())))

    def __rich__(self):
        from rich.table import Table

        lines = self.lines()
        used = _used(lines)
        table = Table(title=self.head(), caption=self.tail())
        for i in used:
            table.add_column(COLUMNS[i], overflow="fold")
        for line in lines:
            table.add_row(*(line[i] for i in used))
        return table

    def _repr_html_(self) -> str:
        lines = self.lines()
        used = _used(lines)
        tail = "" if self.whole is None else f"<p>{html.escape(self.tail())}</p>"
        return _html.table(self.head(), [COLUMNS[i] for i in used], ([line[i] for i in used] for line in lines)) + tail


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
