"""Tables in HTML, for reports in notebooks and on pages."""

import html
from collections.abc import Iterable, Sequence


def table(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table with a caption; everything is escaped."""
    row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    body = "".join(row(line, "td") for line in lines)
    caption = f"<caption>{html.escape(title)}</caption>"
    return f"<table>{caption}<thead>{row(columns, 'th')}</thead><tbody>{body}</tbody></table>"
