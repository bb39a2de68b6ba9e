"""The server under uploads of strangers, over a real socket."""

import contextlib
import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import uvicorn

from dist_jax import main
from dist_jax.bundles import serve, verify
from input_pipeline.pipeline import EvalReader, protocol_of

CLASSES = ('<b>bold</b>', 'caf\udce9', 'dark', 'bright')
READER = EvalReader(num_frames=4, image_size=32, num_clips=2)
LIMITS = serve.Limits(upload_bytes=200_000, upload_seconds=3, decode_seconds=20, decoders=1)


def scores(video):
    """Not of a network: how bright the views are."""
    assert video.shape == (1, *READER.shape) and video.dtype == np.uint8
    share = video.mean() / 255
    return {'probabilities': np.array([[0, 0.25, 0.75 * (1 - share), 0.75 * share]], np.float32)}


@pytest.fixture(scope='module')
def address():
    """(host, port) of a server."""
    served = serve.Served('a <i>name</i>', (('probabilities', CLASSES),), READER, scores)
    with socket.create_server(('127.0.0.1', 0)) as own:
        config = uvicorn.Config(serve.make_app(served, LIMITS), log_level='error')
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([own],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield own.getsockname()
        server.should_exit = True
        thread.join()


@pytest.fixture(scope='module')
def clip(clips):
    return (clips / 'val' / '000000.mp4').read_bytes()


def form(content, field='video', name='clip.mp4'):
    head = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
    return head.encode('utf-8', 'surrogateescape') + content + b'\r\n--x--\r\n'


def ask(address, path, body=None, kind='multipart/form-data; boundary=x', method=None):
    """(status, headers, content) of a request."""
    url = 'http://{}:{}{}'.format(*address, path)
    request = urllib.request.Request(url, body, {'content-type': kind}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def raw(address, data):
    """What the server answers to bytes."""
    with socket.create_connection(address, timeout=30) as own:
        own.sendall(data)
        with contextlib.suppress(ConnectionError):
            own.shutdown(socket.SHUT_WR)
            return own.makefile('rb').read()
    return b''


def test_a_video_gets_its_classes(address, clip):
    status, headers, content = ask(address, '/predict', form(clip))
    assert status == 200 and headers['content-type'] == 'application/json'
    answer = json.loads(content)
    assert set(answer['seconds']) == {'decode', 'model'}
    (top,) = answer['top']
    assert sorted(entry['label'] for entry in top) == sorted(CLASSES)
    shares = [entry['probability'] for entry in top]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)
    model = json.loads(ask(address, '/model')[2])
    assert model['classes'] == [list(CLASSES)] and model['most_bytes'] == LIMITS.upload_bytes


def test_the_page_runs_only_what_is_in_it(address):
    status, headers, content = ask(address, '/')
    assert status == 200 and headers['content-type'].startswith('text/html')
    assert b'a &lt;i&gt;name&lt;/i&gt;' in content and b'<i>' not in content
    policy = headers['content-security-policy']
    assert "default-src 'none'" in policy and 'unsafe' not in policy
    assert headers['x-content-type-options'] == 'nosniff'


@pytest.mark.parametrize(
    ('body', 'kind', 'status', 'text'),
    [
        (form(b'no video at all'), None, 422, 'not a video'),
        (form(b'#EXTM3U\nfile:///etc/passwd\n'), None, 422, 'not a video'),
        (form(b''), None, 400, 'the file is empty'),
        (form(b'a', field='file'), None, 400, "no file 'video'"),
        (form(b'a').replace(b'; filename="clip.mp4"', b''), None, 400, "no file 'video'"),
        (form(b'a')[:-7] + form(b'a'), None, 400, 'Too many files'),
        (form(bytes(300_000)), None, 413, 'more than 0.2 MB'),
        (b'--x', None, 400, "no file 'video'"),
        (b'nothing', None, 400, ''),
        (b'nothing', 'multipart/form-data', 400, 'boundary'),
        (b'nothing', 'application/octet-stream', 415, 'multipart/form-data'),
    ],
)
def test_what_is_no_video_is_refused(address, body, kind, status, text):
    found, headers, content = ask(address, '/predict', body, *([kind] if kind else []))
    assert found == status and text in json.loads(content)['error']
    assert headers['connection'] == 'close'


def test_the_kind_of_a_form_may_be_in_capitals(address, clip):
    assert ask(address, '/predict', form(clip), 'MULTIPART/Form-Data; boundary=x')[0] == 200


def test_a_video_that_is_cut_off_is_refused(address, clip):
    status, _, content = ask(address, '/predict', form(clip[: len(clip) // 2]))
    assert status == 422 and 'truncated' in json.loads(content)['error']
    assert 'tmp' not in json.loads(content)['error']  # nothing of where it lay


def test_names_of_files_mean_nothing(address, clip):
    for name in ('../../etc/passwd', '<script>', '\x1b[31m\u202e.mp4', 'a' * 500, '\udcff'):
        assert ask(address, '/predict', form(clip, name=name))[0] == 200


@pytest.mark.parametrize('method', ['GET', 'PUT', 'DELETE', 'PATCH'])
def test_wrong_methods_and_paths_are_refused(address, method):
    assert ask(address, '/predict', method=method)[0] == 405
    assert ask(address, '/../etc/passwd', method=method)[0] == 404


def test_broken_requests_are_refused(address, clip):
    start = (
        b'POST /predict HTTP/1.1\r\nhost: a\r\ncontent-type: multipart/form-data; boundary=x\r\n'
    )
    for length in (b'abc', b'-5', b'1e3'):
        assert raw(address, start + b'content-length: ' + length + b'\r\n\r\n').startswith(
            b'HTTP/1.1 400'
        )
    # More than is declared, less than is declared, and what is never sent.
    assert b' 200 ' not in raw(address, start + b'content-length: 9\r\n\r\n' + form(clip))
    raw(address, start + b'content-length: 99999\r\n\r\n' + form(clip))
    assert b' 413 ' in raw(address, start + b'content-length: 9999999999\r\n\r\n')
    assert ask(address, '/predict', form(clip))[0] == 200


def test_who_sends_nothing_is_not_waited_for(address):
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.putrequest('POST', '/predict')
    connection.putheader('content-type', 'multipart/form-data; boundary=x')
    connection.putheader('content-length', '1000')
    connection.endheaders(b'--x')
    assert connection.getresponse().status == 408
    connection.close()


def test_too_many_videos_at_a_time_are_told_to_come_again(address):
    waiting = []
    for _ in range(LIMITS.waiting):
        own = http.client.HTTPConnection(*address, timeout=30)
        own.putrequest('POST', '/predict')
        own.putheader('content-type', 'multipart/form-data; boundary=x')
        own.putheader('content-length', '1000')
        own.endheaders(b'--x')
        waiting.append(own)
    deadline = time.monotonic() + 2.8
    while (status := ask(address, '/predict', form(b'a'))[0]) != 429:
        assert time.monotonic() < deadline, status
    for own in waiting:
        own.close()


def test_a_bundle_that_says_no_sampling_is_not_served(tmp_path, monkeypatch):
    class Bundle:
        heads = (('probabilities', CLASSES),)
        video = verify.Spec('video', (None, *READER.shape), 'uint8')

        def __init__(self, sampling):
            self.manifest = {'sampling': sampling}

        def load(self):
            return scores

    made = protocol_of(READER)
    for found, text in (
        (made | {'num_frames': 5}, 'are no views of'),
        (made | {'num_frames': 'all'}, 'sampling'),
        (made | {'num_frames': 10**12}, 'are no views of'),
        (made | {'more': 1}, 'more'),
        (made | {'annotate': 1}, 'annotate'),
        (made | {'sampling': '../'}, 'sampling'),
        (made | {'size': 'all'}, 'sampling'),
        (made | {'interval': []}, 'sampling'),
        ([], 'no views'),
        (None, 'no views'),
    ):
        monkeypatch.setattr(verify, 'read', lambda folder, found=found: Bundle(found))
        with pytest.raises(verify.BundleError, match=text):
            serve.of_bundle(str(tmp_path))
    monkeypatch.setattr(verify, 'read', lambda folder: Bundle(made))
    served = serve.of_bundle(str(tmp_path))
    assert served.reader == READER and len(served.top(np.zeros(READER.shape, np.uint8))[0]) == 4


def test_scores_that_are_no_numbers_and_models_without_classes_are_not_served():
    def broken(video):
        return {'probabilities': np.full((1, 4), np.nan, np.float32)}

    served = serve.Served('a', (('probabilities', CLASSES),), READER, broken)
    with pytest.raises(FloatingPointError):
        served.top(np.zeros(READER.shape, np.uint8))
    with pytest.raises(ValueError, match='classifier'):
        serve.Served('a', (), READER, scores)


def test_wrong_usage(tmp_path, capsys):
    for command, text in (
        ([str(tmp_path)], 'there are no checkpoints in it'),
        ([str(tmp_path), '--port=0'], '--port=0'),
        ([str(tmp_path), '--decoders=0'], '--decoders=0'),
    ):
        assert main.main(['serve', *command]) == 2
        assert text in capsys.readouterr().err
