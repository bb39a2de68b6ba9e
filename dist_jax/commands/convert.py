"""Turns weights of others into ours, and ours into theirs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dist_jax import convert_arguments

SUMMARY = "turn CLIP or the authors' weights into ours, or ours into theirs"


def parser() -> argparse.ArgumentParser:
    return convert_arguments.parser()


def run(argv: Sequence[str]) -> int:
    arguments = convert_arguments.parse(argv)
    if arguments is None:  # No such file: said before jax is imported.
        return 2
    from dist_jax import convert

    return convert.run(arguments)
