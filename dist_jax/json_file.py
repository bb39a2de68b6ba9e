"""JSON files that people and other programs read: whole, and with numbers only."""

from __future__ import annotations

import json
import os
from typing import Any

from etils import epath

from dist_jax.whole_file import appearing


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file, local or in a bucket, that appears whole or not at all.

    Raises:
      ValueError: a number is NaN or infinite, for which JSON has no word.
    """
    path = epath.Path(path)
    data = (json.dumps(value, indent=1, allow_nan=False) + '\n').encode()
    if '://' in os.fspath(path):  # an object appears whole
        path.write_bytes(data)
        return
    with appearing(path) as partial:
        partial.write_bytes(data)
