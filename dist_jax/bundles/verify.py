"""Checks a bundle of `dist_jax export`: its files, its program, the scores of its golden clip.

Every bundle has a copy of this file, which needs numpy, safetensors and what runs the program: jax
with flatbuffers, or onnxruntime.

    python verify.py [BUNDLE]

Exit code 0: the scores are those of the model that was exported. 1: they are not, or the bundle is
damaged; the message names what differs. 2: wrong usage.

A bundle is a program. Nothing in it is executed as Python, and a program that calls functions of
its host is refused; but how long it computes is up to who made it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

FORMAT, VERSION = 'dist_jax bundle', 1
MANIFEST, WEIGHTS, GOLDEN = 'bundle.json', 'weights.safetensors', 'golden.safetensors'
PROGRAMS = {'stablehlo': 'program.stablehlo', 'onnx': 'program.onnx'}
VIDEO = 'video'
# Computed in -> how far a score may be from what it must be. Probabilities count as they are,
# embeddings by their largest value.
BOUNDS = {'float32': 1e-4, 'bfloat16': 2e-2}
MOST_MANIFEST_BYTES = 64 << 20
MOST_NAMED = 5  # differences of a kind in a message

# Names in safetensors files and in numpy.
DTYPES = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16', 'int32': 'I32', 'uint8': 'U8'}
# What a program of ours calls beside StableHLO: the check of an unknown batch size.
_CALL = ' @shape_assertion('
_OUTSIDE = re.compile(r'stablehlo\.(?:infeed|outfeed|send|recv)\b')  # would wait for ever
_FILE_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]{0,99}')
_MOST_SIZE = 1 << 31  # of one axis
_MOST_BATCH = 4096

Outputs = dict[str, np.ndarray]


class BundleError(ValueError):
    """A bundle that cannot be trusted; the message names what differs."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """Name, shape and dtype of an array; an axis of None has any size."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        sizes = ', '.join('any' if size is None else str(size) for size in self.shape)
        return f'{self.dtype} ({sizes})'


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle whose files are those that its manifest lists.

    Attributes:
      folder: where it is.
      manifest: `bundle.json`, checked.
      weights: arguments of the program in their order.
      video: the argument after them, uint8 RGB (batch, views, T, H, W, 3).
      outputs: float32 (batch, n) each.
      heads: (name of the output, class names) of each head.
    """

    folder: str
    manifest: Mapping[str, Any]
    weights: tuple[Spec, ...]
    video: Spec
    outputs: tuple[Spec, ...]
    heads: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def bound(self) -> float:
        """How far scores may be from the golden ones, see `BOUNDS`."""
        return BOUNDS[self.manifest['program']['dtype']]

    def path(self, name: str) -> str:
        """Of one of its files."""
        return os.path.join(self.folder, name)

    def load(self) -> Callable[[np.ndarray], Outputs]:
        """What runs the program: uint8 (batch, views, T, H, W, 3) -> outputs by name.

        Raises:
          BundleError: weights or program are not what the manifest says, or the program fails.
          ImportError: what runs it is not installed.
        """
        run = _LOADERS[self.manifest['program']['kind']](self)

        def checked(video: np.ndarray) -> Outputs:
            try:
                found = {name: np.asarray(rows) for name, rows in run(video).items()}
            except Exception as error:
                raise BundleError(f'the program fails: {_one_line(error)}') from error
            wanted = [
                dataclasses.replace(spec, shape=(len(video), *spec.shape[1:]))
                for spec in self.outputs
            ]
            _compare_specs('an output of the program', wanted, _specs_of(found))
            for name, rows in found.items():
                if not np.isfinite(rows).all():
                    raise BundleError(f'{name}: the program gives scores that are not finite')
            return found

        return checked

    def golden(self) -> Outputs:
        """The golden clip, `video`, and what the model that was exported made of it.

        Raises:
          BundleError: it is not what the manifest says, or not finite.
        """
        rows = self.manifest['golden']['videos']
        wanted = [
            dataclasses.replace(spec, shape=(rows, *spec.shape[1:]))
            for spec in (self.video, *self.outputs)
        ]
        found = _read_arrays(self.path(GOLDEN), wanted, 'an array of the golden clip')
        for spec in self.outputs:
            if not np.isfinite(found[spec.name]).all():
                raise BundleError(f'{GOLDEN}: {spec.name} is not finite')
        return found


def read(folder: str | os.PathLike[str]) -> Bundle:
    """Reads the manifest of a bundle and compares its files with it.

    Raises:
      BundleError: naming what is missing, changed or not as it must be.
    """
    folder = os.fspath(folder)
    manifest = _read_manifest(os.path.join(folder, MANIFEST))
    made = _Fields(manifest)
    if made.text('format') != FORMAT:
        raise BundleError(f'{MANIFEST}: format={_shown(manifest["format"])} is not {FORMAT!r}')
    version = made.integer('format_version', 1, _MOST_SIZE)
    if version != VERSION:
        raise BundleError(
            f'{MANIFEST}: format_version={version}, and this program reads version {VERSION}; '
            'take the verify.py of the bundle, or export it again'
        )
    program = made.fields('program')
    kind = program.one_of('kind', PROGRAMS)
    program.one_of('dtype', BOUNDS)
    for platform in program.items('platforms'):
        _Fields({'platform': platform}, 'program.').text('platform')
    bundle = Bundle(
        folder,
        manifest,
        tuple(_spec(f) for f in made.each('weights')),
        _spec(made.fields('video')),
        tuple(_spec(f) for f in made.each('outputs')),
        tuple((f.text('output'), f.texts('classes')) for f in made.each('heads')),
    )
    _check_protocol(bundle, made)
    _check_files(folder, made.fields('files'), (PROGRAMS[kind], WEIGHTS, GOLDEN))
    return bundle


def _check_protocol(bundle: Bundle, made: _Fields) -> None:
    """Raises BundleError for shapes and names that do not fit each other."""
    shape, outputs = bundle.video.shape, {spec.name: spec for spec in bundle.outputs}
    fine = len(shape) == 6 and None not in shape[1:] and shape[-1] == 3
    if not fine or bundle.video.name != VIDEO or bundle.video.dtype != 'uint8':
        raise BundleError(
            f'{MANIFEST}: video is {bundle.video}; it must be uint8 (batch, views, T, H, W, 3)'
        )
    rows = made.fields('golden').integer('videos', 1, _MOST_BATCH)
    if shape[0] not in (None, rows):
        raise BundleError(f'{MANIFEST}: golden.videos={rows} for batches of {shape[0]}')
    for what, names in (
        ('weights', [spec.name for spec in bundle.weights]),
        ('outputs', [spec.name for spec in bundle.outputs]),
    ):
        if len(set(names)) != len(names) or not names:
            raise BundleError(f'{MANIFEST}: {what} has a name twice, or none')
    for spec in bundle.outputs:
        if spec.dtype != 'float32' or len(spec.shape) != 2 or spec.shape[0] != shape[0]:
            raise BundleError(f'{MANIFEST}: output {_shown(spec.name)} is {spec}')
    for name, classes in bundle.heads:
        if name not in outputs or outputs[name].shape[1] != len(classes):
            raise BundleError(
                f'{MANIFEST}: {len(classes)} classes for the output {_shown(name)}, which is '
                f'{outputs.get(name, "not there")}'
            )
    if any(None in spec.shape for spec in bundle.weights):
        raise BundleError(f'{MANIFEST}: a weight of unknown size')
    for spec in (*bundle.weights, bundle.video, *bundle.outputs):
        if math.prod(size or rows for size in spec.shape) > 1 << 40:
            raise BundleError(f'{MANIFEST}: {_shown(spec.name)} is {spec}, which is too large')


def _check_files(folder: str, listed: _Fields, needed: Sequence[str]) -> None:
    """Raises BundleError naming all files that are missing or changed."""
    missing = [name for name in needed if name not in listed.value]
    if missing:
        raise BundleError(f'{MANIFEST}: files does not list {", ".join(missing)}')
    wrong = []
    for name in listed.value:
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise BundleError(f'{MANIFEST}: files lists {_shown(name)}, which names no file here')
        entry = listed.fields(name)
        size, digest = entry.integer('bytes', 0, 1 << 50), entry.text('sha256')
        wrong += _check_file(folder, name, size, digest)
    if wrong:
        raise BundleError('\n'.join(wrong))


def _check_file(folder: str, name: str, size: int, digest: str) -> list[str]:
    """Why a file is not the one that is listed; [] if it is."""
    path = os.path.join(folder, name)
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return [f'{name} is not a regular file']
        if found.st_size != size:
            return [f'{name} has changed: {found.st_size} bytes, not {size}']
        with open(path, 'rb') as file:
            own = hashlib.file_digest(file, 'sha256').hexdigest()
    except FileNotFoundError:
        return [f'{name} is missing']
    except OSError as error:
        return [f'{name} cannot be read: {error.strerror}']
    return [] if own == digest else [f'{name} has changed: sha256 {own[:12]}, not {digest[:12]!a}']


def _read_manifest(path: str) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise ValueError(f'{word} is no number')

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BundleError(f'{MANIFEST} is not a regular file')
        with open(path, 'rb') as file:
            data = file.read(MOST_MANIFEST_BYTES + 1)
        if len(data) > MOST_MANIFEST_BYTES:
            raise BundleError(f'{MANIFEST} has more than {MOST_MANIFEST_BYTES} bytes')
        found = json.loads(data.decode(), parse_constant=refuse)
    except FileNotFoundError:
        raise BundleError(
            f'{MANIFEST} is missing: this is no bundle of `dist_jax export`'
        ) from None
    except OSError as error:
        raise BundleError(f'{MANIFEST} cannot be read: {error.strerror}') from error
    except RecursionError:
        raise BundleError(f'{MANIFEST} is nested too deep') from None
    except BundleError:
        raise
    except ValueError as error:
        raise BundleError(f'{MANIFEST} is no JSON: {_one_line(error)}') from None
    if not isinstance(found, dict):
        raise BundleError(f'{MANIFEST} holds no object')
    return found


@dataclasses.dataclass(frozen=True)
class _Fields:
    """An object of the manifest, whose fields are asked for by their types."""

    value: Mapping[str, Any]
    path: str = ''

    def _of(self, name: str, kind: type, word: str) -> Any:
        if name not in self.value:
            raise BundleError(f'{MANIFEST}: there is no field {self.path}{_shown(name)}')
        found = self.value[name]
        if not isinstance(found, kind) or isinstance(found, bool):
            raise BundleError(
                f'{MANIFEST}: {self.path}{_shown(name)}={_shown(found)} is not {word}'
            )
        return found

    def text(self, name: str) -> str:
        return self._of(name, str, 'a text')

    def texts(self, name: str) -> tuple[str, ...]:
        found = self.items(name)
        for i, item in enumerate(found):
            if not isinstance(item, str):
                raise BundleError(f'{MANIFEST}: {self.path}{name}[{i}]={_shown(item)} is no text')
        return tuple(found)

    def items(self, name: str) -> list[Any]:
        return self._of(name, list, 'a list')

    def integer(self, name: str, least: int, most: int) -> int:
        found = self._of(name, int, 'a whole number')
        if not least <= found <= most:
            raise BundleError(
                f'{MANIFEST}: {self.path}{name}={_shown(found)} is not {least} to {most}'
            )
        return found

    def one_of(self, name: str, choices: Mapping[str, Any]) -> str:
        found = self.text(name)
        if found not in choices:
            raise BundleError(
                f'{MANIFEST}: {self.path}{name}={_shown(found)} is not one of {", ".join(choices)}'
            )
        return found

    def fields(self, name: str) -> _Fields:
        return _Fields(self._of(name, dict, 'an object'), f'{self.path}{_shown(name)}.')

    def each(self, name: str) -> list[_Fields]:
        return [
            _Fields({'item': item}, f'{self.path}{name}[{i}].').fields('item')
            for i, item in enumerate(self.items(name))
        ]


def _spec(fields: _Fields) -> Spec:
    sizes = fields.items('shape')
    for i, size in enumerate(sizes):
        unknown = size is None and i == 0
        whole = isinstance(size, int) and not isinstance(size, bool)
        if not unknown and not (whole and 0 < size < _MOST_SIZE):
            raise BundleError(f'{MANIFEST}: {fields.path}shape has an axis of {_shown(size)}')
    if len(sizes) > 16:
        raise BundleError(f'{MANIFEST}: {fields.path}shape has {len(sizes)} axes')
    return Spec(fields.text('name'), tuple(sizes), fields.one_of('dtype', DTYPES))


def _specs_of(arrays: Mapping[str, np.ndarray]) -> list[Spec]:
    return [Spec(name, rows.shape, rows.dtype.name) for name, rows in arrays.items()]


def _compare_specs(what: str, wanted: Sequence[Spec], found: Sequence[Spec]) -> None:
    """Raises BundleError naming what is missing, unknown or of another shape or dtype."""
    by_name = {spec.name: spec for spec in found}
    wrong = [f'{_shown(s.name)} is missing' for s in wanted if s.name not in by_name]
    names = {spec.name for spec in wanted}
    wrong += [f'{_shown(name)} is not listed' for name in by_name if name not in names]
    wrong += [
        f'{_shown(spec.name)} is {by_name[spec.name]}, not {spec}'
        for spec in wanted
        if by_name.get(spec.name, spec) != spec
    ]
    if wrong:
        more = f'\nand {len(wrong) - MOST_NAMED} more' if len(wrong) > MOST_NAMED else ''
        raise BundleError('\n'.join(f'{what}: {line}' for line in wrong[:MOST_NAMED]) + more)


def _read_arrays(path: str, wanted: Sequence[Spec], what: str) -> dict[str, np.ndarray]:
    """Arrays of a safetensors file that holds these and nothing else.

    Raises:
      BundleError: it does not, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    names = {code: name for name, code in DTYPES.items()}
    try:
        with safe_open(path, 'numpy') as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            own = [
                Spec(name, tuple(part.get_shape()), names.get(part.get_dtype(), part.get_dtype()))
                for name, part in parts.items()
            ]
            _compare_specs(what, wanted, own)
            return {spec.name: file.get_tensor(spec.name) for spec in wanted}
    except (SafetensorError, OSError) as error:
        raise BundleError(f'{os.path.basename(path)}: {_one_line(error)}') from error


def _load_stablehlo(bundle: Bundle) -> Callable[[np.ndarray], Outputs]:
    import jax
    import jax.export

    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise ImportError('jax reads programs with flatbuffers: pip install flatbuffers') from None
    name = PROGRAMS['stablehlo']
    with open(bundle.path(name), 'rb') as file:
        data = file.read()
    try:
        exported = jax.export.deserialize(bytearray(data))
        text = exported.mlir_module()
    except Exception as error:  # whatever a damaged one makes of the parsers
        raise BundleError(f'{name} is no program that jax can read: {_one_line(error)}') from error
    calls = [part[:80] for part in text.split('custom_call')[1:] if not part.startswith(_CALL)]
    calls += _OUTSIDE.findall(text)
    if calls or exported.ordered_effects or exported.unordered_effects:
        what = _shown(calls[0]) if calls else 'an effect'
        raise BundleError(f'{name} does more than compute: {what}')
    if exported.nr_devices != 1:
        raise BundleError(f'{name} is for {exported.nr_devices} devices')
    _check_signature(bundle, exported)
    weights = _read_arrays(bundle.path(WEIGHTS), bundle.weights, 'a weight')
    weights, call = jax.device_put(weights), jax.jit(exported.call)
    return lambda video: call(weights, video)


def _check_signature(bundle: Bundle, exported: Any) -> None:
    """Raises BundleError for a program with other arguments or results than the manifest says."""
    import jax

    names = [spec.name for spec in bundle.weights]
    if names != sorted(names):
        raise BundleError(f'{MANIFEST}: weights are not in the order of their names')

    def specs(avals: Mapping[str, Any]) -> list[Spec]:
        return [
            Spec(
                name,
                tuple(size if isinstance(size, int) else None for size in aval.shape),
                aval.dtype.name,
            )
            for name, aval in avals.items()
        ]

    try:
        (weights, video), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        given = specs({**weights, VIDEO: video})
        made = specs(jax.tree.unflatten(exported.out_tree, exported.out_avals))
    except (TypeError, ValueError, AttributeError):
        raise BundleError('the program does not take weights by name and a video') from None
    _compare_specs('an argument of the program', (*bundle.weights, bundle.video), given)
    _compare_specs('an output of the program', bundle.outputs, made)


def _load_onnx(bundle: Bundle) -> Callable[[np.ndarray], Outputs]:
    import onnxruntime

    # The graph reads its weights from the file beside it; what they are is compared here.
    _read_arrays(bundle.path(WEIGHTS), bundle.weights, 'a weight')
    name = PROGRAMS['onnx']
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(
            bundle.path(name), options, providers=['CPUExecutionProvider']
        )
    except Exception as error:
        raise BundleError(
            f'{name} is no program that onnxruntime reads: {_one_line(error)}'
        ) from error
    inputs, outputs = session.get_inputs(), [spec.name for spec in bundle.outputs]
    own = [item.name for item in inputs], sorted(item.name for item in session.get_outputs())
    if own != ([VIDEO], sorted(outputs)):
        raise BundleError(f'{name} takes and gives {own}, not {[VIDEO]} and {outputs}')
    return lambda video: dict(zip(outputs, session.run(outputs, {VIDEO: video})))


_LOADERS = {'stablehlo': _load_stablehlo, 'onnx': _load_onnx}


def errors(bundle: Bundle) -> dict[str, float]:
    """Runs the golden clip; output -> its largest error, see `BOUNDS`.

    Raises:
      BundleError: the bundle or its program is not what the manifest says.
      ImportError: what runs the program is not installed.
    """
    golden = bundle.golden()
    found = bundle.load()(golden[VIDEO])
    measured = {}
    for spec in bundle.outputs:
        wanted = golden[spec.name].astype(np.float64)
        error = np.abs(found[spec.name] - wanted).max()
        scores = spec.name in dict(bundle.heads)
        scale = 1.0 if scores else float(np.abs(wanted).max()) or 1.0
        measured[spec.name] = float(error / scale)
    return measured


def _one_line(error: object) -> str:
    text = str(error).strip()
    return ascii(text.splitlines()[0][:300] if text else type(error).__name__)[1:-1]


def _shown(value: Any) -> str:
    text = ascii(value) if not isinstance(value, str) else ascii(value)[1:-1]
    return text if len(text) <= 80 else f'{text[:77]}...'


def describe(bundle: Bundle) -> str:
    """One line: what it is."""
    program = bundle.manifest['program']
    classes = ' and '.join(f'{len(names)} classes' for _, names in bundle.heads) or 'no classes'
    batch = bundle.video.shape[0]
    return (
        f'{program["kind"]} for {", ".join(map(_shown, program["platforms"]))}, '
        f'computes in {program["dtype"]}; '
        f'{classes}; batches of {"any size" if batch is None else batch}'
    )


def check(folder: str) -> int:
    """Verifies a bundle and prints what was measured; returns the exit code.

    Raises:
      ImportError: what runs the program is not installed.
    """
    try:
        bundle = read(folder)
        print(describe(bundle))
        measured = errors(bundle)
    except BundleError as error:
        print(f'refused: {error}', file=sys.stderr)
        return 1
    width = max(map(len, measured))
    for name, error in measured.items():
        print(f'{_shown(name):{width}}  largest error {error:.1e}, at most {bundle.bound:.0e}')
    if max(measured.values()) > bundle.bound:
        print('refused: the scores are not those of the model that was exported', file=sys.stderr)
        return 1
    print('the scores agree')
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command of a bundle."""
    parser = argparse.ArgumentParser(description='Checks a bundle of `dist_jax export`.')
    parser.add_argument(
        'bundle',
        nargs='?',
        default=os.path.dirname(os.path.abspath(__file__)),
        help='its folder; the one of this file by default',
    )
    folder = parser.parse_args(argv).bundle
    if not os.path.isdir(folder):
        parser.error(f'no folder {_shown(folder)}')
    try:
        return check(folder)
    except ImportError as error:
        parser.error(str(error))


if __name__ == '__main__':
    sys.exit(main())
