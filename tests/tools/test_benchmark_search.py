"""The measurement of brute force, on a few vectors."""

from tools import benchmark_search


def test_an_index_is_made_opened_and_compared_with(tmp_path, capsys):
    sizes = ['--windows=2500', '--size=16', '--queries=2', f'--folder={tmp_path}']
    assert benchmark_search.main(sizes) == 0
    said = capsys.readouterr().out
    assert '2500 vectors of 16, float16' in said and 'again: compare' in said
    assert not list(tmp_path.iterdir())
