"""Tables of performance.md and README.md from figures that are there, and what is computed."""

import json

import pytest

from tools import generated, performance_tables

VERSIONS = {'jax': '0.10.2', 'libtpu': '0.0.42.1', 'compiler': 'x'}


def plan(**changes):
    return {
        'topology': 'v4:2x2x1',
        'clips_per_chip': 32.0,
        'fits': True,
        'hbm_bytes_needed': 4 * 2**30,
        'hbm_bytes_limit': 30.75 * 2**30,
        'temp_bytes': 3.16 * 2**30,
        'estimated_cycles': 187.2e6,
        'collective_cycles': 0.3e6,
        'collective_cycles_on_links_of_one_dimension': 1.4e6,
        'clips_per_second_per_chip': 178.4,
        'estimated_mfu': 0.2523,
        'kernel_times': [
            {'schedule_cycles': 20e6, 'memory_cycles': 1e6},
            {'schedule_cycles': 29.2e6, 'memory_cycles': 2.5e6},
        ],
        'versions': VERSIONS,
        **changes,
    }


@pytest.fixture
def pages(tmp_path):
    (tmp_path / 'docs').mkdir()
    part = f'{generated.begin(performance_tables.TOOL, "steps")}\nold\n{generated.END}'
    for path in (tmp_path / 'docs' / 'performance.md', tmp_path / 'README.md'):
        path.write_text(f'# Before\n\n{part}\n\nBehind.\n')
    return tmp_path


def test_figures_are_computed_one_by_one_and_kept(tmp_path):
    path, asked = tmp_path / 'figures.json', []

    def plan_for(compiled):
        return lambda config: asked.append((compiled, config.batch_size)) or plan()

    performance_tables.compute(['dist-b16@v4', 'dist-l14@v5e'], plan_for, path)
    assert asked == [('v4:2x2x1', 128), ('v5e:2x2', 32)]
    performance_tables.compute(['evl-b16@v4'], plan_for, path)
    known = json.loads(path.read_text())
    assert list(known) == ['dist-b16@v4', 'evl-b16@v4', 'dist-l14@v5e']
    assert known['dist-b16@v4']['kernel_cycles_by_schedule'] == 49.2e6
    assert known['dist-b16@v4']['versions'] == {'jax': '0.10.2', 'libtpu': '0.0.42.1'}


def test_pages_get_their_tables_and_keep_the_rest(pages):
    none = dict.fromkeys(
        (
            'estimated_cycles',
            'collective_cycles',
            'collective_cycles_on_links_of_one_dimension',
            'clips_per_second_per_chip',
            'estimated_mfu',
            'kernel_times',
        )
    )
    known = {
        'dist-b16@v4': performance_tables.kept(plan()),
        'dist-l14@v5e': performance_tables.kept(plan(fits=False, **none) | {'kernel_times': []}),
    }
    performance_tables.write_pages(known, pages)
    first = (pages / 'docs' / 'performance.md').read_text()
    assert first.startswith('# Before\n') and first.endswith('\n\nBehind.\n') and 'old' not in first
    assert (
        '| cycles of a step | 187 M |' in first and '| cycles of a step | does not fit |' in first
    )
    assert '| 49.2 M (3.5 M) |' in first and '| MFU | 25.2 % |' in first
    assert 'jax 0.10.2 and libtpu 0.0.42.1' in first
    readme = (pages / 'README.md').read_text()
    assert '| DiST B/16 8+16 | 32 | 187 M cycles, 3.16 GiB | 25.2 % | - | - |' in readme
    performance_tables.write_pages(known, pages)
    assert (pages / 'docs' / 'performance.md').read_text() == first


@pytest.mark.parametrize('page', ['', 'begin', 'begin end begin end'])
def test_a_page_without_the_part_stays_and_is_named(tmp_path, page):
    begin = generated.begin('tools.x', 'rows')
    text = page.replace('begin', f'{begin}\n').replace('end', generated.END)
    path = tmp_path / 'page.md'
    path.write_text(text)
    with pytest.raises(ValueError, match=r'page\.md: .*tools\.x: rows'):
        generated.write(path, 'tools.x', {'rows': 'new'})
    assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


def test_what_is_renewed_is_chosen_by_name():
    assert performance_tables.chosen(['@v5e', 'dist-b16']) == [
        *(f'{step}@v5e' for step in performance_tables.STEPS),
        'dist-b16@v4',
        'dist-b16@v6e',
    ]
    for text in ('dist', '@v7', ''):
        with pytest.raises(ValueError, match='there are dist-b16@v4'):
            performance_tables.chosen([text])
