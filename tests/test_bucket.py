"""A workdir in a bucket: objects are whole, are never appended to, and continue all the same."""

import http.server
import json
import re
import threading
import urllib.parse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from buckets import Objects, stand_in_for_buckets
from etils import epath
from orbax.checkpoint._src.path import gcs_utils

from dist_jax import backbones, checkpoint, evaluate, metric_writer, train, trained
from dist_jax.configs import frame_mean
from dist_jax.json_file import write_json
from dist_jax.reports import page
from dist_jax.step import TrainState
from input_pipeline.bad_videos import BadVideoLog


@pytest.fixture
def bucket(monkeypatch):
    """URL of a folder in an empty bucket; behind epath, where gcsfs is on a pod."""
    stand_in_for_buckets(monkeypatch)
    return 'gs://bucket/runs/one'


def names(url):
    return sorted(path.removeprefix('/') for path in Objects.store if url[5:] in path)


def rows(url):
    return metric_writer.read_metrics(epath.Path(url) / metric_writer.METRICS_FILE)


def test_a_metric_writer_is_copied_when_asked_when_it_is_time_and_at_the_end(bucket, monkeypatch):
    writer = metric_writer.MetricWriter(bucket, 0)
    writer.write_scalars(1, {'loss': 0.5})
    assert not names(bucket)
    writer.flush()
    assert rows(bucket) == [{'step': 1, 'loss': 0.5}]
    monkeypatch.setattr(metric_writer, 'MIRROR_SECONDS', -1)
    writer.write_scalars(2, {'loss': 0.25})
    assert len(rows(bucket)) == 2
    monkeypatch.setattr(metric_writer, 'MIRROR_SECONDS', 1000)
    writer.write_scalars(3, {'loss': 0.1})
    assert len(rows(bucket)) == 2
    folder = writer._mirror.local
    writer.close()
    assert len(rows(bucket)) == 3 and not folder.exists()
    metrics, events = names(bucket)
    assert metrics.endswith('metrics.jsonl') and 'tensorboard/events' in events


def test_a_metric_writer_continues_from_the_bucket(bucket):
    writer = metric_writer.MetricWriter(bucket, 0, tensorboard=False)
    for step in (1, 2, 3):
        writer.write_scalars(step, {'loss': step})
    writer.close()
    writer = metric_writer.MetricWriter(bucket, 2, tensorboard=False)
    writer.write_scalars(3, {'loss': 7})
    writer.close()
    assert [(row['step'], row['loss']) for row in rows(bucket)] == [(1, 1), (2, 2), (3, 7)]


def test_a_copy_that_fails_is_made_up_for(bucket, monkeypatch, caplog):
    writer = metric_writer.MetricWriter(bucket, 0, tensorboard=False)
    writer.write_scalars(1, {'loss': 1})
    with monkeypatch.context() as patch:

        def refuse(*_, **__):
            raise OSError('503 busy')

        patch.setattr(Objects, '_open', refuse)
        with caplog.at_level('WARNING', 'dist_jax'):
            writer.flush()
    assert '503 busy' in caplog.text and not names(bucket)
    writer.close()
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
    write_json(f'{bucket}/summary.json', {'step': 1})
    page.write_report(bucket, {'step': 1}, None)
    assert json.loads((epath.Path(bucket) / 'summary.json').read_text()) == {'step': 1}
    assert '</html>' in (epath.Path(bucket) / 'report.html').read_text()
    assert [name.rpartition('/')[2] for name in names(bucket)] == ['report.html', 'summary.json']


# Checkpoints.


class Requests(http.server.BaseHTTPRequestHandler):
    """The bucket as Google's JSON API, for tensorstore, which goes around fsspec."""

    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def answer(self, code, body=b'', headers=()):
        self.send_response(code)
        for name, value in (*headers, ('Content-Length', str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def target(self):
        """('/bucket/name' or '/bucket', parameters)."""
        path, _, query = self.path.partition('?')
        match = re.fullmatch(r'(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.*))?', path)
        name = urllib.parse.unquote(match[2] or '')
        parameters = dict(urllib.parse.parse_qsl(query))
        return f'/{match[1]}/{name or parameters.get("name", "")}', parameters

    def do_GET(self):
        path, parameters = self.target()
        if path.endswith('/'):  # a listing
            found = [name.removeprefix(path) for name in sorted(Objects.store)]
            items = [{'name': n} for n in found if n.startswith(parameters.get('prefix', ''))]
            self.answer(200, json.dumps({'items': items}).encode())
        elif path not in Objects.store:
            self.answer(404)
        else:
            data = Objects.store[path].getvalue()
            headers = [('x-goog-generation', '1')]
            code, wanted = 200, re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
            if wanted:
                code, size = 206, len(data)
                first, last = int(wanted[1]), int(wanted[2] or size - 1)
                data = data[first : last + 1]
                headers.append(('Content-Range', f'bytes {first}-{first + len(data) - 1}/{size}'))
            self.answer(code, data, headers)

    def do_POST(self):
        path, _ = self.target()
        data = self.rfile.read(int(self.headers['Content-Length']))
        Objects().pipe_file(path, data)
        bucket_name, _, name = path[1:].partition('/')
        self.answer(
            200,
            json.dumps(
                {
                    'name': name,
                    'bucket': bucket_name,
                    'generation': '1',
                    'metageneration': '1',
                    'size': str(len(data)),
                    'md5Hash': '',
                    'etag': '',
                    'timeCreated': '2026-01-01T00:00:00Z',
                    'updated': '2026-01-01T00:00:00Z',
                    'timeStorageClassUpdated': '2026-01-01T00:00:00Z',
                    'storageClass': 'STANDARD',
                }
            ).encode(),
        )

    def do_DELETE(self):
        path, _ = self.target()
        self.answer(204 if Objects.store.pop(path, None) is not None else 404)


@pytest.fixture
def gcs(bucket, monkeypatch):
    """The bucket, also where tensorstore and orbax look for it."""
    # Needs google-cloud-storage, which comes with gcsfs.
    monkeypatch.setattr(gcs_utils, 'get_bucket', lambda name: None)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Requests)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'none')
    yield bucket
    server.shutdown()


def state(step):
    params = {'a': jnp.arange(6.0) + step}
    return TrainState(step=jnp.int32(step), params=params, collections={}, opt_state=(), ema=None)


def abstract_state():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state(0)
    )


def test_checkpoints_lie_in_the_bucket(gcs):
    checkpoints = checkpoint.Checkpoints(gcs, keep=1)
    for step in (1, 2, 3):
        checkpoints.save(state(step), {'format_version': 1, 'step': step})
        if step == 1:
            checkpoints.add_score(step, 'top1', 0.5)
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(gcs, keep=1)
    restored, metadata = checkpoints.restore_latest(abstract_state())
    assert int(restored.step) == metadata['step'] == 3
    np.testing.assert_array_equal(restored.params['a'], np.arange(6.0) + 3)
    assert checkpoints.best() == (1, 0.5)
    checkpoints.close()
    assert checkpoint.find_checkpoint(gcs).name == '3'
    assert {name.split('/')[4] for name in names(gcs)} == {'1', '3'}


def test_a_damaged_checkpoint_in_the_bucket_is_set_aside(gcs, caplog):
    checkpoints = checkpoint.Checkpoints(gcs, keep=2)
    for step in (1, 2):
        checkpoints.save(state(step), {'format_version': 1, 'step': step})
    checkpoints.close()
    for path in list(Objects.store):
        if 'checkpoints/2/state' in path:
            Objects().pipe_file(path, b'noise')
    checkpoints = checkpoint.Checkpoints(gcs, keep=2)
    restored, _ = checkpoints.restore_latest(abstract_state())
    checkpoints.close()
    assert int(restored.step) == 1
    assert 'checkpoints/2 cannot be read' in caplog.text
    folders = {'/'.join(name.split('/')[3:5]) for name in names(gcs)}
    assert folders == {'checkpoints/1', 'checkpoints-broken/2', 'checkpoints-broken/README'}


@pytest.mark.slow
def test_a_run_lies_in_the_bucket_and_continues_there(gcs, clips, tmp_path):
    config = frame_mean.get_config('demo')
    config.model.unroll = False
    config.backbone.checkpoint = str(tmp_path / 'backbone')
    backbones.write_random(config.backbone.checkpoint, 'tiny')
    config.data.update(
        root=str(clips),
        train_list='train.txt',
        val_list='val.txt',
        label_map='labels.txt',
        num_frames=2,
    )
    config.update(batch_size=8, num_steps=4)
    config.eval.batch_size = 8
    config.checkpoint.every_steps = 2
    config.log.every_steps = 1

    def stop(*_):
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train._Loop, '_evaluate', stop)
        with pytest.raises(InterruptedError):
            train.train(config, gcs)
    assert [row['step'] for row in rows(gcs)] == [1, 2, 3, 4]
    summary = train.train(config, gcs)
    steps = [row['step'] for row in rows(gcs) if 'loss' in row]
    assert summary['step'] == 4 and steps == [1, 2, 3, 4]
    written = {name.split('/')[3] for name in names(gcs)}
    assert written == {
        'checkpoints',
        'config.json',
        'curves.png',
        'metrics.jsonl',
        'parameters.txt',
        'report.html',
        'summary.json',
        'tensorboard',
    }
    figures, _ = evaluate.run(trained.saved_config(gcs), gcs, None, '')
    assert figures['top1'] == summary['val_top1']
    assert any(name.endswith('evaluation.html') for name in names(gcs))
