"""The table of TPUs: what shares a program, what is tried, and that it goes on where it was."""

import json

import pytest

from tools import which_tpu

GIB = 2**30


@pytest.fixture(scope='module')
def rows():
    return which_tpu.rows()


def plan_of(asked):
    """A chip of 16 GiB and a model that takes 1 GiB, and half of one for each clip."""

    def plan(config):
        asked.append(config)
        needed = GIB + config.batch_size * GIB / 2
        fits = needed <= 16 * GIB
        return {
            'fits': fits,
            'hbm_bytes_needed': needed,
            'hbm_bytes_limit': 16 * GIB,
            'estimated_seconds': config.batch_size / 100 if fits else None,
        }

    return plan


def test_rows_share_a_program_where_only_data_and_rates_differ(rows):
    firsts = which_tpu.first_rows()
    assert firsts['dist:b16_8+16f_k710_k400'] == 'dist:b16_8+16f_k400'
    assert firsts['side4video:b16_8f_ssv2'] == 'side4video:b16_8f_k400'
    for other in ('dist:b16_16+32f_k400', 'dist:b16_8+16f_ssv2', 'evl:b16_8f_k400'):
        assert firsts[other] == other
    assert set(firsts) == set(rows)


def test_every_row_has_a_length(rows):
    assert all(which_tpu.clips_of(config) > 0 for config in rows.values())
    assert which_tpu.clips_of(rows['evl:b16_8f_k400']) == 50_000 * 256
    assert which_tpu.clips_of(rows['dist:b16_8+16f_k400']) == 36 * 240_436


def test_the_largest_batch_is_found_and_what_was_tried_is_not_tried_again(rows, tmp_path):
    path, known, asked = tmp_path / 'known.json', [], []
    config = rows['dist:b16_8+16f_k400']

    def save():
        path.write_text(json.dumps(known))

    which_tpu.trials(plan_of(asked), config, 1, known, save)
    largest = max(one['clips'] for one in known if one['fits'])
    assert 26 <= largest <= 30 and len(known) <= 4
    assert all(one.batch_norm.groups == one.accumulation == 1 for one in asked)
    assert json.loads(path.read_text()) == known
    again = []
    which_tpu.trials(plan_of(again), config, 1, known, save)
    assert not again
    cell = which_tpu.cell(known, 4, 36 * 240_436)
    assert cell == f'{largest * 4:,} · {36 * 240_436 / 4 / 100 / 3600:.1f} h'


def test_what_does_not_fit_is_no(rows):
    known = [{'clips': 1, 'fits': False, 'hbm_bytes_needed': None, 'estimated_seconds': None}]
    assert which_tpu.cell(known, 1, 10) == 'no'


def test_large_towers_are_split_over_a_slice(rows):
    found = list(which_tpu.topologies(rows['side4video:e14_8f_k400'], ['v5e-1', 'v5e-8']))
    assert found == [('v5e-1', 'v5e:1x1', 1), ('v5e-8', 'v5e:2x4', 8)]
    found = list(which_tpu.topologies(rows['dist:b16_8+16f_k400'], ['v5e-8', 'v4-32']))
    assert found == [('v5e-8', 'v5e:1x1', 1), ('v4-32', 'v4:1x1x1', 1)]
