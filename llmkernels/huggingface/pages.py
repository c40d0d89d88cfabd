"""Which pages of a paged cache belong to which row. Kwon et al. 2023, arXiv:2309.06180.

All layers use the same pages of their own stores. Rows that begin alike (beams, several answers to one prompt) share
pages; a row that writes into one that others have too gets a copy first.
"""

import torch
from torch import Tensor

OP = "PagedCache"


class Pages:
    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self.free = list(range(count - 1, -1, -1))  # the last is taken first: a fresh cache is filled from its front
        self.users = [0] * count
        self.of_rows: list[list[int]] = []
        self.stores: list[Tensor] = []  # of all layers, `[pages, Hk, page_size, D]`
        self._table: Tensor | None = None
        self._found: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None = None

    def clear(self) -> None:
        for row in self.of_rows:
            self._release(row)
        self.of_rows, self._table = [], None

    def reserve(self, before: list[int], after: list[int]) -> list[tuple[int, int]]:
        """Pages for rows that grow from so many keys to so many. Returns the pages to copy, (from, to).

        Raises: ValueError, the cache has too few; nothing has changed then.
        """
        if not any(self.of_rows):
            self.of_rows = [[] for _ in before]
        elif len(self.of_rows) != len(before):
            raise ValueError(f"{OP}: keys have a batch of {len(before)}, expected {len(self.of_rows)}, as those before")
        missing = [max(self._pages(length) - len(row), 0) for row, length in zip(self.of_rows, after, strict=True)]
        shared = self._shared(before, after)
        needed = sum(missing) + len(shared)
        if needed == 0:
            return []
        if needed > len(self.free):
            if not any(self.of_rows):
                self.of_rows = []
            raise ValueError(
                f"{OP}: {needed} more pages of {self.size} keys are needed for {len(after)} rows of up to {max(after)}"
                f" keys, and {len(self.free)} of {self.count} are free; expected more pages"
            )
        copies = []
        for row, at in shared:
            page = self._take()
            copies.append((self.of_rows[row][at], page))
            self.users[self.of_rows[row][at]] -= 1
            self.of_rows[row][at] = page
        for row, more in zip(self.of_rows, missing, strict=True):
            row.extend(self._take() for _ in range(more))
        self._table = None
        return copies

    def _shared(self, before: list[int], after: list[int]) -> list[tuple[int, int]]:
        """(row, which of its pages): those that are written into next, and that another row has too.

        The last row to have it may keep it.
        """
        found, left = [], {}
        for index, row in enumerate(self.of_rows):
            at, part = before[index] // self.size, before[index] % self.size
            if after[index] > before[index] and part and self.users[row[at]] > 1:
                page = row[at]
                left[page] = left.get(page, self.users[page]) - 1
                if left[page] > 0:
                    found.append((index, at))
        return found

    def copy(self, source: int, target: int) -> None:
        for store in self.stores:
            store[target] = store[source]

    def select(self, indices: list[int]) -> None:
        """Rows in another order, some of them more than once or not at all."""
        rows = [list(self.of_rows[index]) for index in indices]
        for row in rows:
            for page in row:
                self.users[page] += 1
        for row in self.of_rows:
            self._release(row)
        self.of_rows, self._table = rows, None

    def crop(self, lengths: list[int]) -> None:
        for row, length in zip(self.of_rows, lengths, strict=True):
            kept = self._pages(length)
            self._release(row[kept:])
            del row[kept:]
        self._table = None

    def place(self, row: int, key: int) -> tuple[int, int]:
        return self.of_rows[row][key // self.size], key % self.size

    def find(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """(page, slot) of each key of a row. All layers of a step ask with the same tensors."""
        table = self.table(rows.device)
        if self._found is None or self._found[0] is not keys or self._found[1] is not table:
            self._found = keys, table, (table[rows, keys // self.size].long(), keys % self.size)
        return self._found[2]

    def table(self, device: torch.device) -> Tensor:
        """int32 `[B, pages of the longest row]`; zeros beyond a row's own."""
        if self._table is None or self._table.device != device:
            longest = max(map(len, self.of_rows))
            rows = [row + [0] * (longest - len(row)) for row in self.of_rows]
            self._table = torch.tensor(rows, dtype=torch.int32, device=device)
        return self._table

    def _pages(self, length: int) -> int:
        return -(-length // self.size)

    def _take(self) -> int:
        page = self.free.pop()
        self.users[page] = 1
        return page

    def _release(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free.append(page)
