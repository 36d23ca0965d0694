"""Many texts as one array of UTF-8 bytes: what the kernels of this room read, without a Python object a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Strings:
    """Text i is `data[offsets[i] : offsets[i + 1]]`; `data` uint8 [N], `offsets` int64 [len + 1], from 0 to N."""

    data: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str | bytes]) -> "Strings":
        """Raises UnicodeEncodeError for a str that is no valid Unicode."""
        parts = [text.encode() if isinstance(text, str) else text for text in texts]
        ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(parts), np.uint8), ends)

    @classmethod
    def of_arrow(cls, column: "pyarrow.Array") -> "Strings":
        """A view of a large_string array without nulls."""
        _, ends, data = column.buffers()
        offsets = np.frombuffer(ends, np.int64)[column.offset : column.offset + len(column) + 1]
        whole = np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)
        return cls(whole[offsets[0] : offsets[-1]], offsets - offsets[0])

    def to_arrow(self) -> "pyarrow.LargeStringArray":
        import pyarrow

        buffers = pyarrow.py_buffer(np.ascontiguousarray(self.offsets)), pyarrow.py_buffer(self.data)
        return pyarrow.LargeStringArray.from_buffers(len(self), *buffers)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> bytes:
        return self.data[self.offsets[i] : self.offsets[i + 1]].tobytes()

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each text, int64 [len]."""
        return np.diff(self.offsets)

    def texts(self) -> list[str]:
        whole = self.data.tobytes()
        return [whole[start:end].decode() for start, end in pairwise(self.offsets.tolist())]

    def chosen(self, which: np.ndarray) -> "Strings":
        """The texts at these places: indices, or a mask, bool [len]. Neighbours are copied in one piece."""
        places = np.flatnonzero(which) if which.dtype == bool else which.astype(np.int64)
        firsts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
        lasts = np.append(firsts[1:], len(places))[: len(firsts)] - 1
        spans = zip(self.offsets[places[firsts]].tolist(), self.offsets[places[lasts] + 1].tolist(), strict=True)
        data = np.concatenate([self.data[:0], *(self.data[start:end] for start, end in spans)])
        data.flags.writeable = False  # as of every other Strings: kernels are compiled anew for what may be written
        return Strings(data, np.concatenate([[0], np.cumsum(self.sizes[places])]))

    def with_texts(self, places: Sequence[int], texts: Sequence[bytes]) -> "Strings":
        """These texts instead of those at `places`, ascending; what stands between is copied in one piece."""
        sizes, parts, at = self.sizes, [], 0
        sizes[places] = [len(text) for text in texts]
        for place, text in zip(places, texts, strict=True):
            parts += [self.data[at : self.offsets[place]], np.frombuffer(text, np.uint8)]
            at = self.offsets[place + 1]
        data = np.concatenate([*parts, self.data[at:]])
        data.flags.writeable = False
        return Strings(data, np.concatenate([[0], np.cumsum(sizes)]))
