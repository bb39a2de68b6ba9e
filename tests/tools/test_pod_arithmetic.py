"""Chip-hours of trainings from planned steps: parts that fit, hours, CPUs, and going on."""

import json

import pytest

from tools import generated, pod_arithmetic, which_tpu

ROW = 'dist:b16_8+16f_k400'
VERSIONS = {'jax': '0.10.2', 'libtpu': '0.0.42.1'}


@pytest.fixture(scope='module')
def rows():
    return which_tpu.rows()


def plan_of(chips, most, asked):
    """A step of 1 ms a clip of a chip, of which so many fit."""

    def plan(config):
        asked.append(config)
        clips = config.batch_size / chips
        return {
            'chips': chips,
            'fits': clips / config.accumulation <= most,
            'estimated_seconds': clips / 1000,
            'estimated_cycles': 1e6,
            'collective_bytes': {'all-reduce': 1000},
            'collective_cycles': 1e5,
            'collective_cycles_on_links_of_one_dimension': 2e5,
            'versions': VERSIONS | {'compiler': 'x'},
        }

    return plan


def test_the_batch_goes_in_the_fewest_parts_that_fit(rows):
    asked = []
    found = pod_arithmetic.planned(plan_of(4, 20, asked), rows[ROW], 4, 1)
    assert [one.accumulation for one in asked] == [1, 2, 4]
    assert found['fits'] and found['accumulation'] == 4 and found['versions'] == VERSIONS
    assert rows[ROW].accumulation == 1
    hours = 36 * 240_436 / 4 / 1000 / 3600
    assert pod_arithmetic.cost(found, rows[ROW]) == f'{4 * hours:.2g} · {hours:.2g} h (4 parts)'


def test_a_batch_smaller_than_the_slice_or_that_never_fits_is_none(rows):
    asked = []
    small = pod_arithmetic.planned(plan_of(64, 9, asked), rows['side4video:e14_8f_k400'], 64, 64)
    assert not asked and pod_arithmetic.cost(small, rows[ROW]) == pod_arithmetic.NONE
    never = pod_arithmetic.planned(plan_of(4, 0, asked), rows[ROW], 4, 1)
    assert len(asked) == 7 and not never['fits']
    assert pod_arithmetic.feeding(never, rows[ROW], {'as they are': 1.0}) == pod_arithmetic.NONE


def test_rows_are_planned_where_they_were_left(monkeypatch, tmp_path):
    asked, path = [], tmp_path / 'known.json'
    monkeypatch.setattr(which_tpu, 'planners', lambda folder: lambda name: plan_of(4, 99, asked))
    monkeypatch.setattr(which_tpu, 'split_over', lambda config, chip: False)
    both = [ROW, 'dist:b16_8+16f_k710_k400']
    targets = [*pod_arithmetic.TARGETS]
    pod_arithmetic.plan_rows(both, targets[:2], False, '', path)
    assert len(asked) == 2  # both rows are one program
    pod_arithmetic.plan_rows(both, targets, False, '', path)
    assert len(asked) == len(targets)
    assert set(json.loads(path.read_text())['plans'][ROW]) == set(targets)
    pod_arithmetic.plan_rows([ROW], ['v5e-8'], True, '', path)
    assert len(asked) == len(targets) + 1
    pod_arithmetic.plan_scaling(False, '', path)
    pod_arithmetic.plan_scaling(False, '', path)
    assert len(asked) == len(targets) + 1 + 3
    assert [one.batch_size for one in asked[-3:]] == [32, 256, 1024]


def test_tables_of_what_is_known(rows, tmp_path):
    step = pod_arithmetic.kept(plan_of(4, 99, [])(rows[ROW]), rows[ROW])
    known = {
        'plans': {ROW: {'v4-8': step}, 'evl:b16_8f_k400': {'v4-8': step}},
        'input': {ROW: {'as they are': 20.0, 'encoded anew': 40.0}},
        'scaling': {'v4:2x4x4': step},
    }
    parts = pod_arithmetic.parts_of(known)
    lines = parts['rows'].splitlines()
    hours = 36 * 240_436 / 4000 / 3600
    assert f'| `{ROW}` | 36 | {4 * hours:.2g} · {hours:.2g} h |  |  |  |  |  |' in lines
    (paid,) = (line for line in lines if line.endswith('| 60 V100-hours |'))
    assert paid.startswith('| `evl:b16_8f_k400` | 53.2 |')
    assert f'| `{ROW}` | 200 / 100 |  |  |  |  |' in lines  # 4,000 clips a second
    assert '| 32 | v4:2x4x4 | all-reduce 0.001 | 1.0 | 0.10 | 0.20 |' in parts['scaling']
    page = tmp_path / 'page.md'
    begins = (generated.begin(pod_arithmetic.TOOL, name) for name in ('rows', 'scaling'))
    page.write_text(''.join(f'{begin}\n{generated.END}\n' for begin in begins))
    generated.write(page, pod_arithmetic.TOOL, parts)
    assert all(text in page.read_text() for text in parts.values())
    assert not pod_arithmetic.parts_of({})
