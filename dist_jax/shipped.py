"""The small CLIP that comes with the package: `weights/tiny_clip.safetensors`.

It was trained by `tools/pretrain_tiny_clip.py` on pictures of the built-in world, and is stored in
float16 under OpenAI's names. `weights/tiny_clip.md` says how, how good it is, and its licence.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from dist_jax import backbones
from dist_jax.convert import convert
from dist_jax.models.clip import SPECS
from dist_jax.models.naming import Options
from dist_jax.paths import SHIPPED, cache_folder

FILE = Path(__file__).parent / 'weights' / 'tiny_clip.safetensors'
SPEC = SPECS[SHIPPED]


def convert_into(workdir: str) -> str:
    """The folder of its conversion in a workdir; see `backbones.made_in`."""
    return backbones.made_in(workdir, write)


def folder_of(backbone: str) -> str:
    """The folder of a converted backbone that may be called `tiny_clip`: then one in the cache.

    A folder of that name in the current one is what it is.
    """
    if backbone != SHIPPED or os.path.exists(backbone):
        return backbone
    digest = hashlib.sha256(FILE.read_bytes()).hexdigest()[:12]
    return convert_into(cache_folder(f'{SHIPPED}-{digest}'))


def write(path: str | os.PathLike[str], source: str | os.PathLike[str] = FILE) -> None:
    """Converts it, or another training of it, in `source`."""
    # Names and shapes do not tell these.
    heads = Options(SPEC.activation, SPEC.num_heads, SPEC.text_num_heads)
    convert(source, path, kind='openclip', options=heads, name=SHIPPED)
