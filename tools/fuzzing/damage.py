"""Damage that any file can take: bytes, JSON values, lines of text."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from tools import fuzz_decode

Rng = np.random.Generator

_BYTES: tuple[Callable[[bytes, bytes, Rng], bytes], ...] = (
    fuzz_decode.flip_bits,
    fuzz_decode.cut,
    fuzz_decode.remove,
    fuzz_decode.double,
    fuzz_decode.move,
    fuzz_decode.splice,
    fuzz_decode.blank,
)

# Text where a name or a number belongs. `@deep@` becomes JSON of that many levels.
WORDS = (
    *('', ' ', '0', '-1', '1_0', '٣', '1e3', 'nan', 'inf', '-inf', '1e400', '0x10', 'None', 'true'),
    *('1000000000000', '9' * 30, '9' * 5000, '../../etc/passwd', '/dev/zero', '/', '.', 'a\0b'),
    *('"', "'", ',', ';', '\t', '\x1b[31mred', 'a[/]b', '=1+1', '\ufeff', '\u202e', 'é' * 300),
    *('x' * 200_000, 'a/' * 5000, '{}', '[]', '%s%n', '\\', '\r'),
)
_VALUES = (
    *(None, True, False, 0, -1, 1.5, 1e308, float('nan'), float('inf'), 10**12, 10**30, 2**63, ''),
    *('x', '64', 'nan', '1_0', 'a\0b', '\ud800', 'x' * 100_000, '../../etc/passwd', '\x1b[31m'),
    *([], [1], ['a'], [[]], {}, {'a': 1}, {'': None}, '@deep@', [0] * 1000),
)


def bytes_of(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Flipped, missing, doubled, moved or overwritten bytes; `other` gives foreign ones."""
    if len(data) < 16:
        return rng.bytes(int(rng.integers(64)))
    damage = _BYTES[rng.integers(len(_BYTES))]
    return damage(data, other if len(other) > 16 else data, rng)


def json_of(value: Any, rng: Rng) -> bytes:
    """JSON text of a value of which one to three places hold something else, or nothing."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.integers(1, 4)):
        places = list(_places(value))
        if not places:
            break
        holder, key = places[rng.integers(len(places))]
        other = _other(rng)
        action = rng.random()
        if action < 0.15:
            del holder[key]
        elif action < 0.25 and isinstance(holder, dict):
            holder[WORDS[rng.integers(len(WORDS))]] = holder.pop(key)
        else:
            holder[key] = other
    if rng.random() < 0.05:
        value = _other(rng)
    levels = int(rng.choice([3, 100, 900, 5000, 200_000]))
    deep = (
        '[' * levels + ']' * levels if rng.random() < 0.5 else '{"a":' * levels + '1' + '}' * levels
    )
    return json.dumps(value).replace('"@deep@"', deep).encode()


def _other(rng: Rng) -> Any:
    # A copy: what is put in is itself a place for the next damage.
    return copy.deepcopy(_VALUES[rng.integers(len(_VALUES))])


def _places(value: Any):
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def text_of(text: str, rng: Rng) -> bytes:
    """Lines of which some fields are others, missing or doubled; now and then in another code."""
    lines = text.split('\n')
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(lines)))
        if rng.random() < 0.3:
            lines[at : at + 1] = [lines[at]] * int(rng.choice([0, 2, 2, 50]))
            lines = lines or ['']
            continue
        sign = next((sign for sign in '\t;, ' if sign in lines[at]), ' ')
        fields = lines[at].split(sign)
        word = WORDS[rng.integers(len(WORDS))]
        place = int(rng.integers(len(fields)))
        if rng.random() < 0.2:
            fields.insert(place, word)
        elif rng.random() < 0.2:
            del fields[place]
        else:
            fields[place] = word
        lines[at] = sign.join(fields)
    code = rng.choice(['utf-8'] * 8 + ['utf-16', 'cp1252'])
    return '\n'.join(lines).encode(code, 'replace')
