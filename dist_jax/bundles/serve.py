"""A small web server: a page to drop a video on, and the same as JSON.

    GET /           the page
    GET /model      what it is, as JSON
    POST /predict   a form with a file `video` -> the most probable classes, as JSON

Who uploads is a stranger: bytes, seconds and videos at a time are limited, a file is decoded in a
process that may die over it, and what cannot be read gets a status of 400 to 429 and one sentence.
There are no accounts and no TLS: to others than this machine, serve it behind what has them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from input_pipeline import escape
from input_pipeline.decode import DecodeError
from input_pipeline.decoder_process import DecoderProcess
from input_pipeline.pipeline import EvalReader, reader_of

log = logging.getLogger('dist_jax')

FIELD = 'video'
TOP = 5
# What is wrong with the server, not with a video.
_OWN_FAULTS = ('missing', 'unreadable')


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a stranger may take.

    Attributes:
      upload_bytes: of a request.
      upload_seconds: from its first byte to its last.
      decode_seconds: of a video.
      decoders: videos that are decoded at a time, a process each.
      waiting: requests at a time; more are told to come again.
    """

    upload_bytes: int = 64 << 20
    upload_seconds: float = 60.0
    decode_seconds: float = 30.0
    decoders: int = 2
    waiting: int = 8


@dataclasses.dataclass(frozen=True)
class Served:
    """A model to serve.

    Attributes:
      name: what the page calls it.
      heads: (output of `run`, class names) of each head.
      reader: makes the views of a video.
      run: uint8 (1, V, T, H, W, 3) -> probabilities (1, num_classes) by output.
    """

    name: str
    heads: tuple[tuple[str, tuple[str, ...]], ...]
    reader: EvalReader
    run: Callable[[np.ndarray], Mapping[str, np.ndarray]]

    def __post_init__(self) -> None:
        if not self.heads:
            raise ValueError('there are no classes to tell apart: serve a classifier')

    def top(self, views: np.ndarray) -> list[list[dict[str, Any]]]:
        """The most probable classes of each head, best first.

        Raises:
          FloatingPointError: scores are NaN or infinite.
        """
        found = self.run(views[None])
        rows = []
        for name, classes in self.heads:
            scores = np.asarray(found[name])[0]
            if not np.isfinite(scores).all():
                raise FloatingPointError('the scores are not finite')
            best = np.argsort(-scores, kind='stable')[:TOP]
            rows.append([{'label': classes[i], 'probability': float(scores[i])} for i in best])
        return rows


class _Server:
    """The answers; one a process."""

    def __init__(self, served: Served, limits: Limits):
        self._served, self._limits = served, limits
        self._requests = 0
        self._model = asyncio.Lock()
        self._idle: asyncio.Queue[DecoderProcess] = asyncio.Queue()
        self._folder = ''

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Decoders are there before the first request, and gone after the last."""
        limits = self._limits
        decoders = [
            DecoderProcess(self._served.reader, limits.decode_seconds)
            for _ in range(limits.decoders)
        ]
        with tempfile.TemporaryDirectory(prefix='dist_jax_serve_') as self._folder:
            try:
                for decoder in decoders:
                    await run_in_threadpool(decoder.start)
                    self._idle.put_nowait(decoder)
                yield
            finally:
                for decoder in decoders:
                    decoder.close()

    async def page(self, request: Request) -> Response:
        name = escape.html(self._served.name)
        return Response(PAGE.replace('MODEL', name), media_type='text/html', headers=_HEADERS)

    async def model(self, request: Request) -> Response:
        reader = self._served.reader
        return _json(
            {
                'name': self._served.name,
                'classes': [list(classes) for _, classes in self._served.heads],
                'frames': reader.num_frames,
                'views': reader.num_views,
                'image_size': reader.image_size,
                'most_bytes': self._limits.upload_bytes,
            }
        )

    async def predict(self, request: Request) -> Response:
        if self._requests >= self._limits.waiting:
            return _error(429, 'there are too many videos; try again in a moment')
        self._requests += 1
        try:
            return await self._predict(request)
        finally:
            self._requests -= 1

    async def _predict(self, request: Request) -> Response:
        number, path = tempfile.mkstemp(dir=self._folder)
        os.close(number)
        try:
            async with asyncio.timeout(self._limits.upload_seconds):
                await self._save(request, path)
            start = time.perf_counter()
            views = await self._decode(path)
        except TimeoutError:
            return _error(408, f'the upload took over {self._limits.upload_seconds:g} s')
        except ClientDisconnect:
            return _error(400, 'the upload ended before its end')
        except DecodeError as error:
            if error.kind in _OWN_FAULTS:
                raise
            status = 413 if error.kind == 'too large' else 422
            return _error(status, f'the video cannot be read: {error.kind}: {error.reason}')
        finally:
            os.unlink(path)
        decoded = time.perf_counter()
        async with self._model:
            top = await run_in_threadpool(self._served.top, views)
        seconds = {'decode': decoded - start, 'model': time.perf_counter() - decoded}
        return _json({'top': top, 'seconds': seconds})

    async def _save(self, request: Request, path: str) -> None:
        """Writes the file of the form.

        Raises:
          HTTPException: there is none, or the request is too large.
        """
        kind = request.headers.get('content-type', '').lower()
        if not kind.startswith('multipart/form-data'):
            raise HTTPException(415, f'send a form (multipart/form-data) with a file {FIELD!r}')
        limited = Request(request.scope, self._limited(request))
        async with limited.form(max_files=1, max_fields=4, max_part_size=1 << 10) as form:
            video = form.get(FIELD)
            if not isinstance(video, UploadFile):
                raise HTTPException(400, f'the form has no file {FIELD!r}')
            if not video.size:
                raise HTTPException(400, 'the file is empty')
            with open(path, 'wb') as file:
                while data := await video.read(1 << 20):
                    file.write(data)

    def _limited(self, request: Request) -> Callable[[], Awaitable[Any]]:
        """What a request receives, until it is too much."""
        most, left = self._limits.upload_bytes, self._limits.upload_bytes
        message = f'the upload has more than {most / 1e6:g} MB'
        declared = request.headers.get('content-length', '')
        if declared.isdecimal() and int(declared) > most:
            raise HTTPException(413, message)

        async def receive() -> Any:
            nonlocal left
            event = await request.receive()
            left -= len(event.get('body', b''))
            if left < 0:
                raise HTTPException(413, message)
            return event

        return receive

    async def _decode(self, path: str) -> np.ndarray:
        decoder = await self._idle.get()
        try:
            return await run_in_threadpool(decoder.read, path)
        finally:
            self._idle.put_nowait(decoder)


def make_app(served: Served, limits: Limits = Limits()) -> Starlette:
    """The application, for any ASGI server."""
    server = _Server(served, limits)
    return Starlette(
        routes=[
            Route('/', server.page),
            Route('/model', server.model),
            Route('/predict', server.predict, methods=['POST']),
        ],
        exception_handlers={HTTPException: _refuse, Exception: _fail},
        lifespan=server.lifespan,
    )


async def _refuse(request: Request, error: HTTPException) -> Response:
    return _error(error.status_code, error.detail, error.headers)


async def _fail(request: Request, error: Exception) -> Response:
    return _error(500, 'the server failed; its log says why')


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    # What is left of an upload that is refused is not read.
    return _json(
        {'error': escape.terminal(text)}, status, {**(headers or {}), 'connection': 'close'}
    )


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    text = json.dumps(value, allow_nan=False)  # in ASCII: any name has an encoding
    return Response(text, status, {**_HEADERS, **(headers or {})}, 'application/json')


def of_bundle(folder: str) -> Served:
    """The model of a bundle.

    Raises:
      BundleError: it is damaged, or says no sampling that there is.
    """
    from dist_jax.bundles import verify

    bundle = verify.read(folder)
    try:
        reader = reader_of(_of_shape(bundle.manifest.get('sampling'), bundle.video.shape[1:]))
    except ValueError as error:
        raise verify.BundleError(f'{verify.MANIFEST}: sampling: {error}') from error
    program = bundle.load()
    rows = bundle.video.shape[0] or 1

    def run(video: np.ndarray) -> Mapping[str, np.ndarray]:
        return program(np.repeat(video, rows, axis=0))

    return Served(_name(folder), bundle.heads, reader, run)


def _of_shape(sampling: Any, shape: Sequence[int]) -> Any:
    """What a manifest says of views, if they are those that its program takes.

    Raises:
      ValueError: they are not.
    """
    names = ('num_clips', 'num_crops', 'num_frames', 'image_size')
    sizes = [sampling.get(name) if isinstance(sampling, dict) else None for name in names]
    if all(isinstance(size, int) for size in sizes):
        clips, crops, frames, size = sizes
        if (clips * crops, frames, size, size, 3) == tuple(shape):
            return sampling
    raise ValueError(f'{ascii(sizes)[:80]} are no views of {tuple(shape)}')


def of_model(model: Any, name: str) -> Served:
    """A `VideoModel`."""
    import jax

    from dist_jax.bundles.export import program_of

    program = program_of(model)
    run = jax.jit(program.run)
    return Served(
        _name(name), program.heads, model.reader, lambda video: run(program.weights, video)
    )


def _name(path: str) -> str:
    return os.path.basename(os.path.abspath(path))


def run(served: Served, host: str, port: int, limits: Limits) -> int:
    """Serves until Ctrl-C; the program is compiled before.

    Raises:
      OSError: it cannot listen there.
    """
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        served.top(np.zeros(served.reader.shape, np.uint8))
        config = uvicorn.Config(
            make_app(served, limits),
            log_level='warning',
            server_header=False,
            timeout_keep_alive=5,
        )
        shown = f'[{host}]' if ':' in host else host
        log.info('serving %s at http://%s:%d', served.name, shown, port)
        uvicorn.Server(config).run(sockets=[listening])
    return 0


_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --dim: #6e6e73; --paper: #fbfbfd;
  --card: #fff; --line: #d2d2d7; --bar: #2f6fde; --track: #2f6fde1f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #f2f2f5; --dim: #9a9aa2; --paper: #161618;
  --card: #1f1f22; --line: #3a3a40; --bar: #6ea0ff; --track: #6ea0ff26; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
main { max-width: 40rem; margin: 0 auto; padding: 3rem 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
p { margin: 0 0 1.5rem; color: var(--dim); }
label { display: block; padding: 2.5rem 1rem; border: 2px dashed var(--line); border-radius: 14px;
  background: var(--card); text-align: center; cursor: pointer; }
label.over, label:focus-within { border-color: var(--bar); }
input { position: absolute; opacity: 0; width: 1px; }
video { display: block; width: 100%; max-height: 18rem; margin-top: 1.25rem; border-radius: 14px;
  background: #000; }
[hidden] { display: none; }
#said { min-height: 1.5rem; margin: 1.25rem 0 .5rem; color: var(--dim); }
#said.bad { color: var(--bad); }
ol { list-style: none; margin: 0 0 1.5rem; padding: 0; }
li { margin: .6rem 0; }
.row { display: flex; justify-content: space-between; gap: 1rem; overflow-wrap: anywhere; }
.row span:last-child { color: var(--dim); font-variant-numeric: tabular-nums; white-space: nowrap; }
.track { height: .5rem; border-radius: .25rem; background: var(--track); overflow: hidden; }
.track div { height: 100%; border-radius: .25rem; background: var(--bar); }
"""

_SCRIPT = """
const [drop, input, player, said, found] =
  ['drop', 'file', 'player', 'said', 'found'].map(id => document.getElementById(id));
let most = Infinity, turn = 0;
fetch('model').then(r => r.json()).then(m => { most = m.most_bytes; }).catch(() => {});

function say(text, bad) { said.textContent = text; said.className = bad ? 'bad' : ''; }

function line(entry) {
  const item = document.createElement('li'), row = document.createElement('div');
  row.className = 'row';
  for (const text of [entry.label, (100 * entry.probability).toFixed(1) + ' %']) {
    row.append(Object.assign(document.createElement('span'), { textContent: text }));
  }
  const track = document.createElement('div'), bar = document.createElement('div');
  track.className = 'track';
  bar.style.width = 100 * entry.probability + '%';
  track.append(bar);
  item.append(row, track);
  return item;
}

async function send(file) {
  const own = ++turn;
  found.replaceChildren();
  URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(file);
  player.hidden = false;
  if (file.size > most) { say('The file has more than ' + most / 1e6 + ' MB.', true); return; }
  say('Looking at it \\u2026');
  const form = new FormData();
  form.append('video', file);
  try {
    const response = await fetch('predict', { method: 'POST', body: form });
    const answer = await response.json();
    if (own !== turn) return;
    if (!response.ok) { say(answer.error, true); return; }
    const { decode, model } = answer.seconds;
    say('decoded in ' + decode.toFixed(2) + ' s, computed in ' + model.toFixed(2) + ' s');
    for (const head of answer.top) {
      const list = document.createElement('ol');
      list.append(...head.map(line));
      found.append(list);
    }
  } catch { if (own === turn) say('The server does not answer.', true); }
}

player.addEventListener('error', () => { player.hidden = true; });
input.addEventListener('change', () => { if (input.files[0]) send(input.files[0]); });
for (const name of ['dragover', 'dragleave', 'drop']) {
  document.addEventListener(name, event => {
    event.preventDefault();
    drop.classList.toggle('over', name === 'dragover');
    if (name === 'drop' && event.dataTransfer.files[0]) send(event.dataTransfer.files[0]);
  });
}
"""

PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MODEL</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>MODEL</h1>
<p>What happens in a video?</p>
<label id="drop">Drop a video here, or click to choose one
<input id="file" type="file" accept="video/*,image/*"></label>
<video id="player" muted loop autoplay playsinline hidden></video>
<div id="said" role="status"></div>
<div id="found"></div>
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_HEADERS = {
    'content-security-policy': (
        f"default-src 'none'; style-src {_hashed(_STYLE)}; "
        f"script-src {_hashed(_SCRIPT)}; connect-src 'self'; media-src blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    'x-content-type-options': 'nosniff',
    'referrer-policy': 'no-referrer',
    'cache-control': 'no-store',
}
