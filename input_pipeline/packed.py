"""Many small things in few arrays: they open fast, and reader processes share their memory.

The pickle of a numpy array may leave its content outside, so that no process that unpickles it
copies it (`workers` sends sources so). A list of a million Python objects is made anew in each.
"""

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np


class Blobs:
    """Byte strings in one array."""

    def __init__(self, content: np.ndarray, ends: np.ndarray):
        """Takes (n,) uint8 and (number of strings,) int64, where each ends in it."""
        self.content, self.ends = content, ends

    @classmethod
    def pack(cls, strings: Sequence[bytes]) -> 'Blobs':
        """Puts byte strings one after the other."""
        ends = np.cumsum([len(string) for string in strings], dtype=np.int64)
        return cls(np.frombuffer(b''.join(strings), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.content[start : self.ends[index]].tobytes()


class Texts(Blobs):
    """Texts in one array of bytes: a million of them open as fast as one."""

    @classmethod
    def pack(cls, texts: Sequence[str]) -> 'Texts':
        """Puts texts one after the other; also names of files that are not UTF-8.

        Raises:
          ValueError: a text has half of a UTF-16 pair, as JSON can write it and no file name is.
        """
        # As on disk, where a name is bytes.
        return super().pack([text.encode('utf-8', 'surrogateescape') for text in texts])

    def __getitem__(self, index: int) -> str:
        return super().__getitem__(index).decode('utf-8', 'surrogateescape')


class TextTuples:
    """Tuples of texts, each of any length: the captions of videos."""

    def __init__(self, texts: Texts, ends: np.ndarray):
        """Takes all texts, and (number of tuples,) int64, where each ends in them."""
        self.texts, self.ends = texts, ends

    @classmethod
    def pack(cls, tuples: Sequence[Sequence[str]]) -> 'TextTuples':
        """Puts tuples one after the other; raises as `Texts.pack`."""
        ends = np.cumsum([len(texts) for texts in tuples], dtype=np.int64)
        return cls(Texts.pack([text for texts in tuples for text in texts]), ends)

    def __getitem__(self, index: int) -> tuple[str, ...]:
        start = int(self.ends[index - 1]) if index else 0
        return tuple(self.texts[k] for k in range(start, int(self.ends[index])))


class Objects:
    """Objects, of which a pickle makes byte strings: each is unpickled when it is asked for.

    None takes no bytes.
    """

    def __init__(self, objects: Sequence[Any]):
        self._objects: Sequence[Any] | None = objects
        self._blobs: Blobs | None = None

    def __getitem__(self, index: int) -> Any:
        if self._blobs is None:
            return self._objects[index]
        content = self._blobs[index]
        return pickle.loads(content) if content else None

    def __getstate__(self) -> dict[str, Any]:
        blobs = self._blobs or Blobs.pack(
            [b'' if each is None else pickle.dumps(each, -1) for each in self._objects]
        )
        return {'_objects': None, '_blobs': blobs}
