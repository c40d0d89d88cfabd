"""The sequences of a batch in a cache: which of their places are padding, and where the others lie."""

import torch
from torch import Tensor


class Rows:
    """What all layers of a cache know alike of its rows.

    transformers counts places: a batch is a rectangle, and shorter prompts have padding on their left. That padding is
    not stored: place p of a row is its key p - padding.
    """

    def __init__(self):
        self.padding: list[int] | None = None  # of each row; None: no row has any, or nothing was said of it
        self._memo: dict = {}

    def clear(self) -> None:
        self.padding, self._memo = None, {}

    def _set(self, padding: list[int] | None) -> None:
        self.padding = padding if padding is not None and any(padding) else None
        self._memo = {}

    def select(self, indices: list[int]) -> None:
        self._set(self.padding and [self.padding[index] for index in indices])

    def crop(self, places: int) -> None:
        self._set(self.padding and [min(padding, places) for padding in self.padding])

    def lengths(self, places: int, batch: int) -> list[int]:
        """How many keys each row has when `places` have been counted."""
        return [places] * batch if self.padding is None else [max(places - padding, 0) for padding in self.padding]

    def longest(self, places: int) -> int:
        return places if self.padding is None else max(places - min(self.padding), 0)

    def seqlens(self, places: int, batch: int, device: torch.device) -> Tensor:
        """The lengths as int32 `[B]`; all layers of a step ask for the same."""
        return self._once(
            ("seqlens", places, batch, device),
            lambda: torch.tensor(self.lengths(places, batch), dtype=torch.int32, device=device),
        )

    def keys(self, places: int, new: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of `new` places after the first `places`, those that are no padding: (row, which of the new, which key)."""

        def find():
            rows = torch.arange(batch, device=device)[:, None].expand(batch, new)
            tokens = torch.arange(new, device=device).expand(batch, new)
            first = torch.tensor(self.padding or [0] * batch, device=device)
            keys = tokens + (places - first)[:, None]
            found = rows.flatten(), tokens.flatten(), keys.flatten()
            if self.padding is None or max(self.padding) <= places:
                return found
            real = found[2] >= 0
            return tuple(index[real] for index in found)

        return self._once(("keys", places, new, batch, device), find)

    def _once(self, key: tuple, make):
        """Keeps the last answer to each question."""
        kept = self._memo.get(key[0])
        if kept is None or kept[0] != key:
            kept = self._memo[key[0]] = (key, make())
        return kept[1]

    def mask(self, places: int, device: torch.device) -> Tensor | None:
        """`[B, places]`, False where padding was; None if there was none."""
        if self.padding is None:
            return None
        first = torch.tensor(self.padding, device=device)
        return torch.arange(places, device=device) >= first[:, None]

    def knows(self, mask: Tensor | None, places: int, new: int) -> bool:
        """Whether a mask `[B, places + new]` hides the padding alone; that of rows without a key yet is learned here.

        Raises: ValueError, it shows what was padding when the keys were stored, and so was not.
        """
        if mask is None:
            return True
        if mask.dim() != 2 or mask.shape[1] != places + new:
            return False
        mask = mask.bool()
        if self.padding is None and bool(mask.all()):
            return True
        before = self.padding or [0] * mask.shape[0]
        if len(before) != mask.shape[0]:
            return False
        first = torch.where(mask.any(1), mask.int().argmax(1), mask.shape[1])
        found = first.tolist()
        for row, (was, now) in enumerate(zip(before, found, strict=True)):
            if now < min(was, places):
                raise ValueError(
                    f"attention_mask shows row {row} from place {now}, expected no earlier than {was}: what was padding"
                    " when it came is not in the cache"
                )
            if now != was < places:
                return False
        if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) >= first[:, None]):
            return False
        if found != before:
            self._set(found)
        return True
