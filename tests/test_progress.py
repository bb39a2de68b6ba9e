"""How far a command is, where the output is no terminal."""

import io

from dist_jax import progress
from input_pipeline.escape import Console


def test_without_a_terminal_the_bar_prints_lines(capsys):
    with progress.Bar('train', 10, completed=2) as bar:
        bar.update(3)
        bar.line('loss 0.5')
    assert capsys.readouterr().err == 'train 3/10 loss 0.5\n'


def test_without_a_terminal_a_long_silence_is_broken(capsys):
    with progress.Bar('evaluate', 40, silence=0.0) as bar:
        for done in (1, 2, 40):
            bar.update(done)
    first, second = capsys.readouterr().err.splitlines()
    assert first == 'evaluate 1/40 2 %'  # compiled in that time: no word of how long the rest takes
    assert second.startswith('evaluate 2/40 5 %, ETA ')
    with progress.Bar('evaluate', 40, silence=60.0) as bar:
        bar.update(1)
    assert not capsys.readouterr().err


def test_on_a_terminal_names_are_no_markup_and_move_no_cursor(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        progress, 'Console', lambda stderr: Console(file=screen, force_terminal=True, width=140)
    )
    with progress.Bar('predict [b]', 10) as bar:
        bar.update(1, 'a[/b] \x1b]0;x\x07.mp4', 20)
    said = screen.getvalue()
    assert 'predict [b]' in said and r'a[/b] \x1b]0;x\x07.mp4' in said and '1/20' in said


def test_durations_read_as_on_a_clock():
    assert [progress.duration(s) for s in (0, 59.6, 61, 3600, 36061)] == [
        '0:00',
        '1:00',
        '1:01',
        '1:00:00',
        '10:01:01',
    ]
