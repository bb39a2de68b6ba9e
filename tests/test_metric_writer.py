"""What a run writes while it runs: JSON Lines that continue, TensorBoard."""

import json
import math
import resource

import pytest
from tensorboardX.proto.event_pb2 import Event

from dist_jax import metric_writer


def written(workdir):
    return [
        json.loads(line) for line in (workdir / metric_writer.METRICS_FILE).read_text().splitlines()
    ]


@pytest.fixture
def first_session(tmp_path):
    """A workdir whose metrics file has steps 1 to 5, the validation of step 4 among them."""
    writer = metric_writer.MetricWriter(tmp_path, 0, tensorboard=False)
    for step in range(1, 6):
        writer.write_scalars(step, {'loss': 1 / step})
        if step == 4:
            writer.write_scalars(step, {'val_top1': 0.5})
    writer.close()
    return tmp_path


def test_rows_are_there_while_the_run_goes_on(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path / 'new' / 'run', 0, tensorboard=False)
    writer.write_scalars(1, {'loss': 2.5, 'clips': 4})
    assert written(tmp_path / 'new' / 'run') == [{'step': 1, 'loss': 2.5, 'clips': 4}]
    writer.close()


def test_a_restored_run_drops_what_it_measures_again(first_session):
    before = written(first_session)
    writer = metric_writer.MetricWriter(first_session, 4, tensorboard=False)
    assert written(first_session) == before[:-1]
    writer.write_scalars(5, {'loss': 0.1})
    writer.close()
    assert [row['step'] for row in written(first_session)] == [1, 2, 3, 4, 4, 5]
    assert written(first_session)[-1] == {'step': 5, 'loss': 0.1}
    assert [path.name for path in first_session.iterdir()] == [metric_writer.METRICS_FILE]


def test_a_run_from_the_start_begins_a_new_file(first_session):
    metric_writer.MetricWriter(first_session, 0, tensorboard=False).close()
    assert written(first_session) == []


@pytest.mark.parametrize('tail', ['{"step": 6, "lo', '{"step": 6', '{', '\x00\x00\x00'])
def test_a_half_written_last_line_is_left_out(first_session, tail):
    path = first_session / metric_writer.METRICS_FILE
    before = written(first_session)
    with path.open('a') as file:
        file.write(tail)
    assert metric_writer.read_metrics(path) == before
    writer = metric_writer.MetricWriter(first_session, 5, tensorboard=False)
    writer.write_scalars(6, {'loss': 0.0})
    writer.close()
    assert written(first_session) == [*before, {'step': 6, 'loss': 0.0}]


@pytest.mark.parametrize(
    'damage', ['\x00\x00\x00', 'x', '5', '[]', '{}', '{"step": null}', '[' * 9999]
)
def test_a_row_that_is_not_readable_takes_no_other_with_it(first_session, damage):
    path = first_session / metric_writer.METRICS_FILE
    before = written(first_session)
    lines = path.read_text().splitlines()
    path.write_text('\n'.join([*lines[:2], damage, *lines[2:], '']))
    assert metric_writer.read_metrics(path) == before
    metric_writer.MetricWriter(first_session, 5, tensorboard=False).close()
    assert written(first_session) == before


def test_an_evaluation_that_does_not_count_is_dropped(first_session):
    before = written(first_session)
    metric_writer.MetricWriter(first_session, 4, tensorboard=False, evaluated=False).close()
    assert written(first_session) == before[:4]


def test_a_disk_that_takes_no_events_is_an_error_and_not_a_wait_for_ever(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))
    try:
        with pytest.raises(OSError, match=r'File too large.*tensorboard'):
            writer.write_texts(0, {'config': 'x' * 2**19})
            for step in range(20):
                writer.write_scalars(step, {'loss': 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_is_no_number_is_written_as_text(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path, 0)
    writer.write_scalars(1, {'loss': math.nan, 'grad_norm': math.inf, 'low': -math.inf, 'lr': 0.1})
    writer.close()
    (row,) = written(tmp_path)
    assert row == {'step': 1, 'loss': 'nan', 'grad_norm': 'inf', 'low': '-inf', 'lr': 0.1}
    assert math.isnan(float(row['loss']))


def events(folder):
    """Every event of the TensorBoard files: records of length, checksum, message, checksum."""
    found = []
    for path in sorted(folder.glob('*tfevents*')):
        data, position = path.read_bytes(), 0
        while position < len(data):
            length = int.from_bytes(data[position : position + 8], 'little')
            found.append(Event.FromString(data[position + 12 : position + 12 + length]))
            position += 16 + length
    return found


def test_tensorboard_has_scalars_and_texts(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path, 0)
    writer.write_scalars(3, {'loss': 0.25, 'val_top1': 0.5})
    writer.write_texts(0, {'config': 'seed: 7'})
    writer.close()
    found = {
        value.tag: (event.step, value)
        for event in events(tmp_path / 'tensorboard')
        for value in event.summary.value
    }
    assert found['loss'][0] == 3 and found['loss'][1].simple_value == 0.25
    assert found['val_top1'][1].simple_value == 0.5
    (text,) = (value for name, (_, value) in found.items() if name.startswith('config'))
    assert b'seed: 7' in text.tensor.string_val[0]


def test_tensorboard_of_a_restored_run_hides_later_steps(tmp_path):
    metric_writer.MetricWriter(tmp_path, 0).close()
    metric_writer.MetricWriter(tmp_path, 4).close()
    starts = [e.step for e in events(tmp_path / 'tensorboard') if e.session_log.status == 1]
    assert starts == [5]


def test_tensorboard_can_be_left_out(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path, 0, tensorboard=False)
    writer.write_texts(0, {'config': 'seed: 7'})
    writer.close()
    assert not (tmp_path / 'tensorboard').exists()
