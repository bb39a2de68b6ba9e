"""A model as a folder that runs without this package: a program, its weights, and a check.

    program.stablehlo     of `jax.export`, for CPU, CUDA and TPU; or program.onnx
    weights.safetensors   the arguments of the program, but for the video
    golden.safetensors    a small clip and what the model makes of it
    bundle.json           what the program takes and gives, class names, sampling, sha256 of all
    verify.py             checks all of that, see `dist_jax.bundles.verify`
    README.md             how to run it

The program is the step of the evaluation: uint8 views in, probabilities averaged over views out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from dist_jax import step
from dist_jax.bundles import onnx_program, verify
from dist_jax.embedding.embedder import Embedding, clip_embedding
from dist_jax.json_file import write_json
from dist_jax.models.api import Tree
from dist_jax.models.layers import exact_float32, portable
from dist_jax.models.params import safetensors_header
from dist_jax.sharding import to_host
from dist_jax.tasks.api import Labels
from dist_jax.tasks.classifier import Classifier
from dist_jax.video_model import VideoModel
from dist_jax.whole_file import folder_appearing
from input_pipeline import motion_world
from input_pipeline.pipeline import protocol_of

log = logging.getLogger('dist_jax')

PLATFORMS = ('cpu', 'cuda', 'tpu')
FORMATS = tuple(verify.PROGRAMS)
GOLDEN_VIDEOS = 2  # so that their rows can be told apart
MOST_GOLDEN_BYTES = 32 << 20  # beyond which there is one
PACKAGES = ('dist_jax', 'jax', 'jaxlib', 'flax', 'numpy')
EMBEDDING, PROBABILITIES = 'embedding', 'probabilities'


@dataclasses.dataclass(frozen=True)
class Program:
    """A model as a pure function of arrays that have names.

    Attributes:
      run: (weights by name, uint8 (B, V, T, H, W, 3)) -> float32 (B, n) by name.
      weights: name in the tree of `VideoModel.variables` -> array, sorted by name.
      video: shape of the views of one video, (V, T, H, W, 3).
      heads: (output, class names) of each head; () where there are no classes.
    """

    run: Callable[[Mapping[str, jax.Array], jax.Array], dict[str, jax.Array]]
    weights: dict[str, jax.Array]
    video: tuple[int, ...]
    heads: tuple[tuple[str, tuple[str, ...]], ...]

    def arguments(self, batch: Any) -> tuple[dict[str, jax.ShapeDtypeStruct], Any]:
        """Shapes of the arguments of `run`, of `batch` videos, a number or a symbol."""
        weights = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in self.weights.items()
        }
        return weights, jax.ShapeDtypeStruct((batch, *self.video), jnp.uint8)


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """Stands where `eval_function` takes a task: what a bundle gives for a video."""

    task: Classifier | None
    heads: tuple[str, ...]
    eval_input_keys: tuple[str, ...] = ()

    def predict(self, outputs: Tree, num_views: int) -> dict[str, jax.Array]:
        found = {EMBEDDING: Embedding(clip_embedding).predict(outputs, num_views)['clip']}
        if self.task is not None:
            found |= zip(self.heads, self.task.predict(outputs, num_views)['scores'])
        return found


def program_of(model: VideoModel, platform: str = '') -> Program:
    """The program of a model: the embedding, and with a classifier the probabilities.

    Args:
      model: what to export.
      platform: that it is for alone, see `portable`; '' for all.
    """
    task = model.trained.task if isinstance(model.trained.task, Classifier) else None
    labels: Labels = () if task is None else task.labels
    names = [PROBABILITIES]
    if len(labels) > 1:
        names = [f'{PROBABILITIES}_{head}' for head in range(len(labels))]
    heads = tuple(zip(names, labels))
    leaves, structure = jax.tree_util.tree_flatten_with_path(model.variables)
    paths = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves]
    outputs = _Outputs(task, tuple(name for name, _ in heads))
    function = exact_float32(step.eval_function(model.trained.model, outputs))

    def run(weights: Mapping[str, jax.Array], video: jax.Array) -> dict[str, jax.Array]:
        tree = jax.tree.unflatten(structure, [weights[path] for path in paths])
        with portable(platform):
            return function(tree['network'], tree['frozen'], {'video': video})

    weights = {path: leaf for path, (_, leaf) in zip(paths, leaves)}
    whole = Program(run, dict(sorted(weights.items())), model.reader.shape, heads)
    return _without_unread(whole)


def _without_unread(program: Program) -> Program:
    """The program without weights that its outputs do not depend on, as a text tower."""
    jaxpr = jax.make_jaxpr(program.run)(*program.arguments(1)).jaxpr
    _, read = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    kept = {name: leaf for used, (name, leaf) in zip(read, program.weights.items()) if used}

    def run(weights: Mapping[str, jax.Array], video: jax.Array) -> dict[str, jax.Array]:
        zeros = {
            name: jnp.zeros(leaf.shape, leaf.dtype)
            for name, leaf in program.weights.items()
            if name not in kept
        }
        return program.run({**weights, **zeros}, video)

    return dataclasses.replace(program, run=run, weights=kept)


def stablehlo(program: Program, batch_size: int) -> bytes:
    """The program of `jax.export`, for all `PLATFORMS`.

    Args:
      program: what to export.
      batch_size: videos that it takes; 0 for any number.

    Raises:
      ValueError: the model cannot take a number of videos that is not known.
      ImportError: flatbuffers is not installed.
    """
    batch = batch_size or jax.export.symbolic_shape('batch')[0]
    jitted = jax.jit(program.run, keep_unused=True)
    try:
        with _without_places():
            exported = jax.export.export(jitted, platforms=PLATFORMS)(*program.arguments(batch))
    except Exception as error:
        if batch_size:
            raise
        raise ValueError(
            'the model takes no batch of unknown size, so its program is for batches of one size: '
            f'pass --batch_size=N ({str(error).splitlines()[0]})'
        ) from error
    return bytes(exported.serialize())


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Leaves out of a program where on this machine its source lay."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update('jax_traceback_in_locations_limit', 0)
    try:
        yield
    finally:
        jax.config.update('jax_traceback_in_locations_limit', before)


def run(
    model: VideoModel,
    out: str | os.PathLike[str],
    *,
    batch_size: int = 0,
    form: str = 'stablehlo',
) -> dict[str, Any]:
    """Writes a bundle and verifies it; it appears whole or not at all.

    Args:
      model: what to export.
      out: folder to make.
      batch_size: videos that the program takes; 0 for any number.
      form: of `FORMATS`.

    Returns:
      `seconds`, `bytes` of all files, and `errors`: output -> the largest error of the golden clip.

    Raises:
      ValueError: the model cannot be exported, or the program gives other scores than the model.
      FileExistsError: there is something at `out`.
      ImportError: what writes or runs the program is not installed.
      ending.AgainError: another process makes the same.
    """
    if jax.process_count() > 1:
        raise ValueError('export runs in one process; start it on a single host')
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f'{out} exists; choose another --out, or remove it')
    with folder_appearing(out) as partial:
        start = time.perf_counter()
        _write(model, partial, batch_size, form)
        seconds = time.perf_counter() - start
        bundle = verify.read(partial)
        errors = verify.errors(bundle)
        if max(errors.values()) > bundle.bound:
            raise ValueError(
                f'the program gives other scores than the model, errors of {errors}; at most '
                f'{bundle.bound} are expected'
            )
    size = sum(path.stat().st_size for path in out.iterdir())
    return {'seconds': seconds, 'bytes': size, 'errors': errors}


def _write(model: VideoModel, folder: Path, batch_size: int, form: str) -> None:
    if form == 'onnx':
        onnx_program.check(model.trained.model.dtype)
        if not batch_size:
            log.info('an ONNX program is for batches of one size: of one video, see --batch_size')
        batch_size = batch_size or 1
    log.info('tracing the program')
    program = program_of(model, onnx_program.PLATFORM if form == 'onnx' else '')
    places = _write_arrays(folder / verify.WEIGHTS, program.weights)
    path = folder / verify.PROGRAMS[form]
    if form == 'onnx':
        onnx_program.write(program, path, batch_size, places)
    else:
        path.write_bytes(stablehlo(program, batch_size))
    log.info('the model on the golden clip')
    golden = golden_clip(model, program, batch_size)
    _write_arrays(folder / verify.GOLDEN, golden)
    shutil.copyfile(verify.__file__, folder / 'verify.py')
    manifest = _manifest(model, program, batch_size, form, golden)
    (folder / 'README.md').write_text(_readme(manifest), encoding='utf-8')
    manifest['files'] = {path.name: _entry(path) for path in sorted(folder.iterdir())}
    manifest['model']['sha256'] = manifest['files'][verify.WEIGHTS]['sha256']
    write_json(folder / verify.MANIFEST, manifest)


def golden_clip(model: VideoModel, program: Program, batch_size: int) -> dict[str, np.ndarray]:
    """`video`, the views of clips that are drawn here, and what the evaluation makes of them."""
    rows = batch_size or (
        1 if GOLDEN_VIDEOS * math.prod(program.video) > MOST_GOLDEN_BYTES else GOLDEN_VIDEOS
    )
    size = max(64, model.image_size * 5 // 4)
    times = np.linspace(0, 1, 3 * model.num_frames, endpoint=False)
    clips = np.stack(
        [
            motion_world.render_clip(motion_world.plan_clip(0, 'val', index), size, times)
            for index in range(rows)
        ]
    )
    found = {
        verify.VIDEO: np.stack([model.views(clip) for clip in clips]),
        EMBEDDING: model.embed(clips),
    }
    if program.heads:
        scores = model.score(clips)
        heads = scores if isinstance(scores, tuple) else (scores,)
        found |= {name: head for (name, _), head in zip(program.heads, heads)}
    return found


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> dict[str, int]:
    """Writes safetensors, one array in memory at a time; name -> its place in the file."""
    leaves = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in arrays.items()}
    text, places = safetensors_header(leaves, {'format': 'pt'})
    with open(path, 'wb') as file:
        file.write(text)
        for name, place in places.items():
            file.seek(place)
            file.write(np.ascontiguousarray(to_host(arrays[name])).reshape(-1).view(np.uint8))
    return places


def _entry(path: Path) -> dict[str, Any]:
    with open(path, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return {'bytes': path.stat().st_size, 'sha256': digest}


def _manifest(
    model: VideoModel,
    program: Program,
    batch_size: int,
    form: str,
    golden: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """`bundle.json` without the files; docs/guides/export.md says what the fields mean."""
    batch = batch_size or None
    outputs = sorted(name for name in golden if name != verify.VIDEO)
    frozen = model.trained.model.frozen
    return {
        'format': verify.FORMAT,
        'format_version': verify.VERSION,
        'model': {
            'family': model.config.model.family,
            'task': model.config.task.name,
            'step': model.trained.step,
            'backbone': None if frozen is None else _backbone(frozen.backbone.identity()),
        },
        'program': {
            'kind': form,
            'platforms': list(PLATFORMS) if form == 'stablehlo' else ['onnxruntime'],
            'dtype': np.dtype(model.trained.model.dtype).name,
        },
        'weights': [
            {'name': name, 'shape': list(leaf.shape), 'dtype': np.dtype(leaf.dtype).name}
            for name, leaf in program.weights.items()
        ],
        'video': {'name': verify.VIDEO, 'shape': [batch, *program.video], 'dtype': 'uint8'},
        'outputs': [
            {'name': name, 'shape': [batch, golden[name].shape[1]], 'dtype': 'float32'}
            for name in outputs
        ],
        'heads': [{'output': name, 'classes': list(classes)} for name, classes in program.heads],
        'sampling': protocol_of(model.reader),
        'golden': {'videos': len(golden[verify.VIDEO])},
        'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _backbone(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a bundle says of a backbone: not where it lay."""
    return {name: value for name, value in identity.items() if name != 'path'}


def _readme(manifest: Mapping[str, Any]) -> str:
    views, frames, size = manifest['video']['shape'][1:4]
    batch = manifest['video']['shape'][0]
    heads = '\n'.join(
        f'- `{head["output"]}`: float32 (batch, {len(head["classes"])}), a probability a class; '
        'their names are in `bundle.json` under `heads`'
        for head in manifest['heads']
    )
    made = manifest['sampling']
    return _README.format(
        family=manifest['model']['family'],
        batch='any number of' if batch is None else batch,
        views=views,
        frames=frames,
        size=size,
        clips=made['num_clips'],
        crops=made['num_crops'],
        sampling=json.dumps(made),
        heads=f'{heads}\n' if heads else '',
        versions=', '.join(f'{name} {v}' for name, v in manifest['versions'].items()),
        run=_RUN[manifest['program']['kind']],
    )


_RUN = {
    'stablehlo': """\
```sh
pip install jax flatbuffers numpy safetensors
python verify.py
```

```python
import jax
import jax.export
from safetensors.numpy import load_file

program = jax.export.deserialize(bytearray(open('program.stablehlo', 'rb').read()))
weights = jax.device_put(load_file('weights.safetensors'))
video = load_file('golden.safetensors')['video']
outputs = program.call(weights, video)
```

The program takes the weights in the order of their names, which is that of `bundle.json`, and then
the video. It is for CPU, CUDA and TPU.
""",
    'onnx': """\
```sh
pip install onnxruntime numpy safetensors
python verify.py
```

```python
import onnxruntime
from safetensors.numpy import load_file

session = onnxruntime.InferenceSession('program.onnx')
video = load_file('golden.safetensors')['video']
outputs = session.run(None, {'video': video})
```

The program reads its weights from `weights.safetensors`, which must lie beside it.
""",
}

_README = """\
# A {family} video model, exported by dist_jax

{run}
In: `video`, uint8 RGB (batch, {views}, {frames}, {size}, {size}, 3), {batch} videos of {views}
views ({clips} along time, {crops} crops of each). Pixels are 0 to 255; the program normalises them.

Out:

{heads}- `embedding`: float32 (batch, n), what the head reads of a video

Both are means over the views. The views are made of a video as `bundle.json` says under `sampling`;
with dist_jax installed, `dist_jax serve .` does it:

    {sampling}

`verify.py` compares all files with `bundle.json` and runs the clip of `golden.safetensors`, whose
scores are known.

Made with {versions}.
"""
