"""Parity of Side4Video's retrieval with what its authors' code recorded."""

from pathlib import Path

import pytest

from tools import check_parity

GOLDEN = Path(__file__).parent.parent / 'golden'


@pytest.mark.parametrize(
    ('name', 'count'),
    [('', 97), ('_clip_tower', 213), ('_eva_tower', 214)],
    ids=['heads', 'clip', 'eva'],
)
def test_it_agrees_with_the_recording(name, count):
    rows = check_parity.check(GOLDEN / f'side4video_retrieval{name}.safetensors')
    assert len(rows) == count
    assert [(row.name, row.error, row.note) for row in rows if not row.ok] == []
