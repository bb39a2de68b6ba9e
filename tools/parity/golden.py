"""Recorded runs of a reference system: inputs, parameters, and what came out.

One safetensors file. Sections are the first part of a tensor's name: `inputs`, `params`,
`backbone` and `buffers` go into the model; everything else was recorded and has to be reproduced.
Metadata `config` is JSON with the sizes. Optional metadata: `scales` (int8 tensors, value = int8 *
scale), `grad_stride` (gradients stored flattened, every n-th element), and names of gradients that
are zero on paper, where the recorded values are rounding noise.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

EXPECTED_FILE = 'expected.safetensors'
INPUT_SECTIONS = ('inputs', 'params', 'backbone', 'buffers')

# Metadata that says how tensors are to be read -> JSON type, and what is in it.
FORMS: dict[str, tuple[type, type | tuple[type, ...], str]] = {
    'scales': (dict, (int, float), 'an object of numbers'),
    'grad_stride': (dict, int, 'an object of whole numbers'),
    'analytic_zero_grads': (list, str, 'a list of names'),
    'analytic_zero_eval_grads': (list, str, 'a list of names'),
}


@dataclasses.dataclass(frozen=True)
class Golden:
    """A recorded run.

    Attributes:
      path: what the user named: the file, or the folder that holds it beside a checkpoint.
      file: the safetensors file itself.
      config: sizes and options of the recorded model.
      metadata: the other metadata, JSON decoded where it is JSON.
      tensors: name -> array, dequantised.
    """

    path: Path
    file: Path
    config: dict[str, Any]
    metadata: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def section(self, name: str) -> dict[str, np.ndarray]:
        """Tensors of one section, its name removed."""
        return {
            key.removeprefix(f'{name}/'): value
            for key, value in self.tensors.items()
            if key.startswith(f'{name}/')
        }

    @property
    def recorded(self) -> dict[str, np.ndarray]:
        """Tensors that have to be reproduced."""
        return {
            name: value
            for name, value in self.tensors.items()
            if not any(part in INPUT_SECTIONS for part in name.split('/')[:2])
        }

    @property
    def zero_gradients(self) -> frozenset[str]:
        """Names, with section, of gradients that are zero on paper."""
        listed = set(self.config.get('grads_that_are_analytically_zero', ()))
        for key, section in (
            ('analytic_zero_grads', 'grads'),
            ('analytic_zero_grads', 'grads_norm'),
            ('analytic_zero_eval_grads', 'eval_grads'),
            ('analytic_zero_eval_grads', 'eval_grads_norm'),
        ):
            listed |= {f'{section}/{name}' for name in self.metadata.get(key, ())}
        return frozenset(listed)


def is_gradient(name: str) -> bool:
    """Whether a recorded tensor is compared with the bound for gradients."""
    return any('grad' in part for part in name.split('/')[:2])


def gradient_section(name: str) -> str:
    """The section of a gradient: its name as far as the part that says it is one."""
    parts = name.split('/')
    return '/'.join(parts[:1] if 'grad' in parts[0] else parts[:2])


def read_golden(path: str | os.PathLike[str]) -> Golden:
    """Opens a golden file, or a folder with `expected.safetensors` beside a checkpoint.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: no golden file: not safetensors, without `config` in its metadata, or with other
        metadata that say nothing.
    """
    path = Path(path)
    file = path / EXPECTED_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f'{file}: no such file')
    try:
        with safe_open(file, 'np') as opened:
            raw = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f'{file}: not a safetensors file ({error})') from None
    metadata = {key: _json_or_text(value) for key, value in raw.items()}
    # A file without a network has no sizes.
    config = metadata.pop('config', {} if 'source' in metadata else None)
    if not isinstance(config, dict):
        raise ValueError(f'{file}: its metadata has no `config`, so it is no golden file')
    _check_forms(metadata, file)
    scales = metadata.get('scales', {})
    absent = [name for name in scales if name not in tensors]
    if absent:
        raise ValueError(f'{file}: its metadata scales {absent[0]!r}, which is no tensor in it')
    for name, scale in scales.items():
        tensors[name] = tensors[name].astype(np.float32) * np.float32(scale)
    return Golden(path, file, config, metadata, tensors)


def _check_forms(metadata: dict[str, Any], file: Path) -> None:
    for key, (whole, inside, form) in FORMS.items():
        found = metadata.get(key, whole())
        parts = found.values() if isinstance(found, dict) else found
        if not isinstance(found, whole) or not all(isinstance(part, inside) for part in parts):
            raise ValueError(f'{file}: `{key}` of its metadata is not {form}')


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
