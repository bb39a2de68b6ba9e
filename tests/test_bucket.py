"""A workdir in a bucket: objects are whole, are never appended to, and continue all the same."""

import json
import typing

import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from dist_jax import logbook, report, train
from input_pipeline.bad_videos import BadVideoLog


class Objects(MemoryFileSystem):
    """A bucket: no appending, and a folder is there only while something lies in it."""

    protocol = ('gs', 'gcs')
    cachable = False
    store: typing.ClassVar[dict] = {}
    pseudo_dirs: typing.ClassVar[list] = ['']

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix('gs://').removeprefix('gcs://'))

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def _open(self, path, mode='rb', **options):
        assert mode in ('rb', 'wb'), f'{path} was opened with mode {mode}'
        return super()._open(path, mode, **options)


@pytest.fixture
def bucket(monkeypatch):
    """URL of a folder in an empty bucket; behind epath, where gcsfs is on a pod."""
    Objects.store.clear()
    objects = Objects()
    monkeypatch.setattr(backend.fsspec_backend, 'fs', lambda path: objects)
    return 'gs://bucket/runs/one'


def names(url):
    return sorted(path.removeprefix('/') for path in Objects.store if url[5:] in path)


def rows(url):
    return logbook.read_metrics(epath.Path(url) / logbook.METRICS_FILE)


def test_a_logbook_is_copied_when_asked_when_it_is_time_and_at_the_end(bucket, monkeypatch):
    book = logbook.Logbook(bucket, 0)
    book.write_scalars(1, {'loss': 0.5})
    assert not names(bucket)
    book.flush()
    assert rows(bucket) == [{'step': 1, 'loss': 0.5}]
    monkeypatch.setattr(logbook, 'MIRROR_SECONDS', -1)
    book.write_scalars(2, {'loss': 0.25})
    assert len(rows(bucket)) == 2
    monkeypatch.setattr(logbook, 'MIRROR_SECONDS', 1000)
    book.write_scalars(3, {'loss': 0.1})
    assert len(rows(bucket)) == 2
    folder = book._mirror.local
    book.close()
    assert len(rows(bucket)) == 3 and not folder.exists()
    metrics, events = names(bucket)
    assert metrics.endswith('metrics.jsonl') and 'tensorboard/events' in events


def test_a_logbook_continues_from_the_bucket(bucket):
    book = logbook.Logbook(bucket, 0, tensorboard=False)
    for step in (1, 2, 3):
        book.write_scalars(step, {'loss': step})
    book.close()
    book = logbook.Logbook(bucket, 2, tensorboard=False)
    book.write_scalars(3, {'loss': 7})
    book.close()
    assert [(row['step'], row['loss']) for row in rows(bucket)] == [(1, 1), (2, 2), (3, 7)]


def test_a_copy_that_fails_is_made_up_for(bucket, monkeypatch, caplog):
    book = logbook.Logbook(bucket, 0, tensorboard=False)
    book.write_scalars(1, {'loss': 1})
    with monkeypatch.context() as patch:

        def refuse(*_, **__):
            raise OSError('503 busy')

        patch.setattr(Objects, '_open', refuse)
        with caplog.at_level('WARNING', 'dist_jax'):
            book.flush()
    assert '503 busy' in caplog.text and not names(bucket)
    book.close()
    assert len(rows(bucket)) == 1


def test_bad_videos_continue_in_the_bucket(bucket):
    def batch(*bad):
        return {
            'index': np.array(bad),
            'path': np.array([f'/v/{i}.mp4' for i in bad], object),
            'epoch': np.zeros(len(bad), int),
            'error': np.array(['corrupt: half'] * len(bad), object),
        }

    path = f'{bucket}/bad_videos.jsonl'
    BadVideoLog(path, 0.5, 10).add(batch(1, 2))
    log = BadVideoLog(path, 0.5, 10)
    assert len(log) == 2 and log.add(batch(2, 4)) == 1
    entries = epath.Path(path).read_text().splitlines()
    assert [json.loads(line)['index'] for line in entries] == [1, 2, 4]


def test_reports_and_json_go_to_the_bucket(bucket):
    train.write_json(f'{bucket}/summary.json', {'step': 1})
    report.write_report(bucket, {'step': 1}, None, ())
    assert json.loads((epath.Path(bucket) / 'summary.json').read_text()) == {'step': 1}
    assert '</html>' in (epath.Path(bucket) / 'report.html').read_text()
    assert [name.rpartition('/')[2] for name in names(bucket)] == ['report.html', 'summary.json']
