"""What `accelerate` did, module by module, and why not where it did nothing."""

from collections import Counter
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Entry:
    """One module. `error` is the largest relative error of a row seen in verification; None if it was not run."""

    path: str
    module: str
    swapped: bool
    detail: str
    error: float | None = None


@dataclass
class Report:
    """Prints as a table; `entries` has one line for every norm-like module."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def swapped(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.swapped]

    @property
    def kept(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.swapped]

    def to_dict(self) -> dict:
        return {"swapped": len(self.swapped), "kept": len(self.kept), "entries": [asdict(e) for e in self.entries]}

    def _lines(self) -> list[tuple[str, str, str, str]]:
        """Modules of one class with one outcome share a line."""
        groups: dict[tuple[str, bool, str], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((entry.module, entry.swapped, entry.detail), []).append(entry)
        lines = []
        for (module, swapped, detail), entries in groups.items():
            where = entries[0].path or "(the model itself)"
            where = where if len(entries) == 1 else f"{where} and {len(entries) - 1} more"
            errors = [entry.error for entry in entries if entry.error is not None]
            seen = f", largest error {max(errors):.0e}" if errors and swapped else ""
            lines.append((where, module, "swapped" if swapped else "kept", detail + seen))
        return lines

    def __str__(self) -> str:
        counts = Counter("swapped" if entry.swapped else "kept" for entry in self.entries)
        head = f"accelerate: {counts['swapped']} swapped, {counts['kept']} kept as they were"
        return "\n".join([head, *("  " + " | ".join(line) for line in self._lines())])

    def __rich__(self):
        from rich.table import Table

        table = Table(title=str(self).splitlines()[0])
        for column in ("module", "class", "", "what runs, or why not"):
            table.add_column(column, overflow="fold")
        for line in self._lines():
            table.add_row(*line)
        return table
