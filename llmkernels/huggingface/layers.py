"""What a cache has of one layer of a model: keys and values, in one piece or in pages, and attention to them.

Both store `[..., Hk, slots, D]`, so that the keys of a head lie side by side: `[B, Hk, max_length, D]`, or with pages
`[pages, Hk, page_size, D]`.
"""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from llmkernels._autograd import needs_grad
from llmkernels.accelerate.huggingface.deferred import CachedStates
from llmkernels.accelerate.huggingface.masks import KeyCount
from llmkernels.huggingface.pages import Pages
from llmkernels.huggingface.rows import Rows
from llmkernels.ops.attention.kvcache import attend
from llmkernels.ops.attention.reference import Options


class Layer(CacheLayerMixin):
    """A layer of transformers' Cache. `window`: how many keys a query sees at most, itself included; None: all."""

    is_compileable = False  # transformers then neither compiles the model nor makes masks of the whole cache
    is_croppable = True
    op = "cache"  # the name in errors
    renews = False  # whether it takes other memory, where it is empty and other keys come

    def __init__(self, rows: Rows, window: int | None):  # the base class's would set keys and values, properties here
        self.rows, self.window = rows, window
        self.places = 0  # of a row, padding included: what transformers calls the length
        self.key_store: Tensor | None = None
        self.value_store: Tensor | None = None
        self._fitting: tuple | None = None  # shapes, dtypes and device checked last: a step has those of the one before

    # --- what transformers asks ---------------------------------------------------------------------------------------

    @property
    def is_initialized(self) -> bool:
        return self.key_store is not None

    @property
    def is_sliding(self) -> bool:
        return self.window is not None

    @property
    def keys(self) -> Tensor | None:
        """`[B, Hk, places, D]`, with zeros where padding was."""
        return None if self.key_store is None else self._read(self.key_store)

    @property
    def values(self) -> Tensor | None:
        return None if self.value_store is None else self._read(self.value_store)

    def get_seq_length(self) -> int:
        return self.places

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        count = self.places + query_length
        return (count if torch.compiler.is_compiling() else KeyCount.of(count, self)), 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append `[B, Hk, S, D]`. Returns all keys and values, which are not made where our attention takes them.

        Raises, before anything is written: ValueError or TypeError, they do not fit what is there, the cache is too
        small, or a gradient is to be recorded.
        """
        key, value = key_states, value_states
        shapes = key.shape, value.shape, key.dtype, value.dtype, key.device
        if shapes != self._fitting or needs_grad(key, value):
            self._check(key, value)
        new = shapes[0][2]
        self._make_room(key, value)
        if new:
            self._write(key, value)
        self.places += new
        self._fitting = shapes
        if torch.compiler.is_compiling():
            return self.keys, self.values
        return CachedStates.of(self, "keys"), CachedStates.of(self, "values")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._make_room(key_states, value_states)

    def reset(self) -> None:
        self.places, self._fitting = 0, None

    # --- what attention and masks ask ---------------------------------------------------------------------------------

    def knows(self, mask: Tensor | None, new: int) -> bool:
        return self.rows.knows(mask, self.places, new)

    def takes(self, query: Tensor) -> bool:
        """Whether the kernel does: under autocast query, keys and values may be of several dtypes."""
        return query.dtype == self.key_store.dtype == self.value_store.dtype

    def attend(self, query: Tensor, window: int | None, scale: float | None, softcap: float, sinks: Tensor | None,
               backend: str | None) -> Tensor:  # fmt: skip
        """Of queries `[B, H, S, D]`, the last S of each row; `[B, S, H, D]`."""
        if scale is None:
            scale = query.shape[3] ** -0.5
        options = Options(scale, -1 if window is None else window - 1, 0, False, softcap, 0.0)
        key, value, seqlens, table = self._stored()
        return attend(query, key, value, sinks, seqlens, table, options, backend).transpose(1, 2)

    # --- reading and writing ------------------------------------------------------------------------------------------

    def _check(self, key: Tensor, value: Tensor) -> None:
        if needs_grad(key, value):
            raise ValueError(
                f"{self.op}: keys require a gradient, expected none that do: it has no backward (use torch.no_grad())"
            )
        if self.key_store is None or (self.renews and not self.places):
            return
        batch = self.batch_size if self.places else key.shape[0]
        for name, new, store in (("keys", key, self.key_store), ("values", value, self.value_store)):
            if new.dtype != store.dtype:
                raise TypeError(f"{self.op}: {name} have dtype {new.dtype}, expected {store.dtype}, that of the others")
            got, expected = (*new.shape[:2], new.shape[3]), (batch, store.shape[1], store.shape[3])
            if got != expected:
                raise ValueError(
                    f"{self.op}: {name} have batch, heads and head_dim {got}, expected {expected}, those of the others"
                )
            if new.device != store.device:
                raise ValueError(f"{self.op}: {name} are on {new.device}, expected {store.device}, with the others")

    def _stored(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What the kernel reads: keys, values, lengths and pages of the rows."""
        raise NotImplementedError

    def _slots(self, places: int, new: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of new places that are no padding: row, which of the new, and where in the store: its first index, slot."""
        raise NotImplementedError

    def _write(self, key: Tensor, value: Tensor) -> None:
        row, token, first, slot = self._slots(self.places, key.shape[2])
        one_each = key.shape[2] == 1 and len(row) == key.shape[0]
        for store, new in ((self.key_store, key), (self.value_store, value)):
            store[first, :, slot] = new[:, :, 0] if one_each else new[row, :, token]

    def _read(self, store: Tensor) -> Tensor:
        row, place, first, slot = self._slots(0, self.places)
        out = store.new_zeros(self.batch_size, store.shape[1], self.places, store.shape[3])
        out[row, :, place] = store[first, :, slot]
        return out


class StaticLayer(Layer):
    op, renews = "StaticCache", True

    def __init__(self, rows: Rows, window: int | None, max_length: int):
        super().__init__(rows, window)
        self.max_length, self.batch_size = max_length, -1

    def get_max_length(self) -> int:
        return self.max_length

    def _make_room(self, key: Tensor, value: Tensor) -> None:
        needed = self.rows.longest(self.places + key.shape[2])
        if needed > self.max_length:
            raise ValueError(f"{self.op}: {needed} keys are to be kept, expected no more than {self.max_length}")
        if self.places == 0:
            batch = key.shape[0]
            for name, like in (("key_store", key), ("value_store", value)):
                shape, store = (batch, like.shape[1], self.max_length, like.shape[3]), getattr(self, name)
                if store is None or store.shape != shape or store.dtype != like.dtype or store.device != like.device:
                    setattr(self, name, like.new_empty(shape))
            self.batch_size = batch

    def _slots(self, places: int, new: int):
        row, token, key = self.rows.keys(places, new, self.batch_size, self.key_store.device)
        return row, token, row, key

    def _write(self, key: Tensor, value: Tensor) -> None:
        if self.rows.padding is None:
            new = key.shape[2]
            self.key_store.narrow(2, self.places, new).copy_(key)
            self.value_store.narrow(2, self.places, new).copy_(value)
        else:
            super()._write(key, value)

    def _read(self, store: Tensor) -> Tensor:
        return store[:, :, : self.places] if self.rows.padding is None else super()._read(store)

    def _stored(self):
        used = self.rows.longest(self.places)
        keys, values = self.key_store.narrow(2, 0, used), self.value_store.narrow(2, 0, used)
        if self.rows.padding is None:
            return keys, values, None, None
        return keys, values, self.rows.seqlens(self.places, self.batch_size, keys.device), None

    def select(self, indices: Tensor) -> None:
        """Rows in another order, some of them more than once or not at all."""
        self._fitting = None
        if self.key_store is None:
            return
        used, indices = self.rows.longest(self.places), indices.to(self.key_store.device)
        for name in ("key_store", "value_store"):
            store = getattr(self, name)
            rows = store[:, :, :used].index_select(0, indices)
            if len(indices) != self.batch_size:
                store = store.new_empty(len(indices), *store.shape[1:])
                setattr(self, name, store)
            store[:, :, :used] = rows
        self.batch_size = len(indices)


class PagedLayer(Layer):
    op = "PagedCache"

    def __init__(self, rows: Rows, window: int | None, pages: Pages):
        super().__init__(rows, window)
        self.pages = pages

    @property
    def batch_size(self) -> int:
        return len(self.pages.of_rows) if self.pages.of_rows else -1

    def get_max_length(self) -> int:
        return self.pages.count * self.pages.size

    def _make_room(self, key: Tensor, value: Tensor) -> None:
        batch, new = key.shape[0], key.shape[2]
        lengths = self.rows.lengths(self.places, batch), self.rows.lengths(self.places + new, batch)
        for source, target in self.pages.reserve(*lengths):
            self.pages.copy(source, target)
        if self.key_store is None:
            for name, like in (("key_store", key), ("value_store", value)):
                store = like.new_empty(self.pages.count, like.shape[1], self.pages.size, like.shape[3])
                setattr(self, name, store)
                self.pages.stores.append(store)

    def _slots(self, places: int, new: int):
        row, token, key = self.rows.keys(places, new, self.batch_size, self.key_store.device)
        return row, token, *self.pages.find(row, key)

    def _write(self, key: Tensor, value: Tensor) -> None:
        if key.shape[0] == key.shape[2] == 1 and self.rows.padding is None:  # one token of one row, without indices
            page, slot = self.pages.place(0, self.places)
            self.key_store[page, :, slot] = key[0, :, 0]
            self.value_store[page, :, slot] = value[0, :, 0]
        else:
            super()._write(key, value)

    def _stored(self):
        device = self.key_store.device
        seqlens = self.rows.seqlens(self.places, self.batch_size, device)
        return self.key_store, self.value_store, seqlens, self.pages.table(device)
