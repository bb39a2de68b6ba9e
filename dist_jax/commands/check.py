"""Reads every video of a list."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

SUMMARY = 'read every video of a list and report what cannot be read'


def parser() -> argparse.ArgumentParser:
    from input_pipeline import check

    return check.parser()


def run(argv: Sequence[str]) -> int:
    from input_pipeline import check

    return check.main(list(argv))
