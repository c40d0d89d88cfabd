"""What `quantize` did, layer by layer, and why not where it did nothing."""

from dataclasses import asdict, dataclass, field

from llmkernels import _html

COLUMNS = ("layer", "class", "format, or why not", "error of the weight", "bytes")


@dataclass(frozen=True)
class Layer:
    """One module. `detail` is the format and its bits, or why the module was left as it is.

    `error` is |quantized - weight| / |weight| (of an LSTM: of all its matrices); `output_error` the same of the outputs
    on calibration data, (without, with) what was found on them. Bytes are those of weights and what reads them.
    """

    path: str
    module: str
    quantized: bool
    detail: str
    error: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    output_error: tuple[float, float] | None = None


@dataclass
class Report:
    """Prints as a table, in a notebook too. `layers` has a line for each Linear, Embedding and LSTM of the model.

    `bytes_before` and `bytes_after` are those of all parameters and buffers of the model; weights that are `kept` for
    `restore` are not among them.
    """

    scheme: str
    layers: list[Layer] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    kept: bool = False

    @property
    def quantized(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.quantized]

    @property
    def skipped(self) -> list[Layer]:
        return [layer for layer in self.layers if not layer.quantized]

    def to_dict(self) -> dict:
        return {
            "scheme": self.scheme,
            "quantized": len(self.quantized),
            "skipped": len(self.skipped),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def _head(self) -> str:
        share = self.bytes_after / self.bytes_before if self.bytes_before else 1.0
        return (
            f"quantize: {len(self.quantized)} layers in {self.scheme}, {len(self.skipped)} left as they were;"
            f" the model: {bytes_text(self.bytes_before)} -> {bytes_text(self.bytes_after)} ({share:.0%})"
            + (", and the weights it had, kept for restore" if self.kept else "")
        )

    def _lines(self) -> list[tuple[str, ...]]:
        lines = []
        for layer in self.layers:
            where, sizes, error = layer.path or "(the model itself)", "", ""
            if layer.quantized:
                sizes = f"{bytes_text(layer.bytes_before)} -> {bytes_text(layer.bytes_after)}"
                error = f"{layer.error:.2%}"
                if layer.output_error is not None:
                    error += " (outputs: {:.2%} -> {:.2%})".format(*layer.output_error)
            lines.append((where, layer.module, layer.detail, error, sizes))
        return lines

    def __str__(self) -> str:
        return "\n".join([self._head(), *("  " + " | ".join(filter(None, line)) for line in self._lines())])

    def __rich__(self):
        from rich.table import Table

        table = Table(title=self._head())
        for column in COLUMNS:
            table.add_column(column, overflow="fold")
        for line in self._lines():
            table.add_row(*line)
        return table

    def _repr_html_(self) -> str:
        return _html.table(self._head(), COLUMNS, self._lines())


def bytes_text(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
