"""Compiled programs on disk, so that the same plan asked twice compiles once.

jax's own compilation cache does not serve here: it cannot read a program back for devices that
are not there. So the compiler's answer is kept instead: the text of the program and its memory.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from dist_jax.paths import cache_folder
from dist_jax.plan.compiling import Compiled

VERSION = 2  # of what is kept, and of `sharding.compiler_options`


def default_folder() -> str:
    """Where programs are kept if nobody says."""
    return cache_folder('plan')


def key(lowered_text: str, topology: str, versions: Mapping[str, str]) -> str:
    """Name of a program: everything that decides what the compiler answers.

    Args:
      lowered_text: of the program, with locations.
      topology: what it is compiled for.
      versions: of what compiles it; see `topology.versions`.
    """
    flags = {name: os.environ.get(name, '') for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')}
    digest = hashlib.sha256(
        json.dumps([VERSION, topology, versions, flags], sort_keys=True).encode()
    )
    digest.update(_LOCATION.sub(_own_location, lowered_text).encode())
    return digest.hexdigest()


_LOCATION = re.compile(r'loc\("([^"]*)":\d+:\d+(?: to (?:\d+)?:\d+)?\)')
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_PLANNER = os.path.dirname(os.path.abspath(__file__)) + os.sep


def _own_location(found: re.Match[str]) -> str:
    """Lines of the model count, as tables name them; lines of who asked for the plan do not."""
    own = found[1].startswith(_PACKAGE) and not found[1].startswith(_PLANNER)
    return found[0] if own and not found[1].endswith('main.py') else ''


def read(folder: str, name: str) -> Compiled | None:
    """The compiler's answer, if it was kept; None if not, or if the file is damaged."""
    if not folder:
        return None
    try:
        with gzip.open(Path(folder) / f'{name}.json.gz', 'rt', encoding='utf-8') as file:
            fields = json.load(file)
        fields['largest'] = tuple(map(tuple, fields['largest']))
        return Compiled(**fields)
    except (OSError, EOFError, ValueError, TypeError, KeyError):
        return None


def write(folder: str, name: str, compiled: Compiled) -> None:
    """Keeps an answer; the file appears whole or not at all."""
    if not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    partial = Path(folder) / f'.{name}.{os.getpid()}.partial'
    with gzip.open(partial, 'wt', encoding='utf-8', compresslevel=4) as file:
        json.dump(dataclasses.asdict(compiled), file)
    os.replace(partial, Path(folder) / f'{name}.json.gz')
