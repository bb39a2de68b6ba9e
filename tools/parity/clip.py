"""CLIP: a tiny checkpoint in a foreign container, converted by the real tool and read back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dist_jax import convert
from dist_jax.models import clip, converted
from dist_jax.models.backbone import Taps
from dist_jax.models.layers import l2_normalize
from dist_jax.models.naming import Options
from tools.parity.golden import Golden

# Of config.container -> kind of the converter.
_KINDS = {
    'hf': 'huggingface',
    'openai': 'openai',
    'openclip': 'openclip',
    'openclip_half': 'openclip',
}
_CONFIG_NAMES = {'text_num_heads': 'text_heads'}
_SUFFIXES = ('.safetensors', '.pt', '.pth', '.bin')


def matches(golden: Golden) -> bool:
    """Whether the file records a bare CLIP."""
    return 'container' in golden.config


def run(golden: Golden) -> dict[str, np.ndarray]:
    """Stream after `ln_pre` (0) and after every block, embeddings, logits.

    Raises:
      ValueError: the converter refuses the container, or finds another geometry than recorded.
    """
    config = golden.config
    kind = _KINDS.get(config['container'], 'auto')
    container = _container(golden)
    folder = container if container.is_dir() else container.parent
    flags = {}
    if kind == 'openai' or (
        kind != 'huggingface' and not (folder / 'open_clip_config.json').exists()
    ):
        # What the container does not say; a user would pass it on the command line.
        flags = {
            'activation': config['activation'],
            'num_heads': config['num_heads'],
            'text_num_heads': config['text_heads'],
        }
    with tempfile.TemporaryDirectory() as temporary:
        dest = Path(temporary) / 'converted'
        metadata = convert.convert(container, dest, kind=kind, options=Options(**flags))
        params = converted.load_params(dest)
    spec = clip.ClipSpec(**metadata['spec'])
    for field, value in metadata['spec'].items():
        recorded = config.get(_CONFIG_NAMES.get(field, field), value)
        if recorded != value:
            raise ValueError(f'{container}: {field} converts to {value}, recorded is {recorded}')

    taps = Taps(outputs=tuple(range(spec.depth)), stem=True, embedding=True)

    @jax.jit
    def forward(params: dict, pixels: jax.Array, tokens: jax.Array) -> dict[str, jax.Array]:
        image = clip.encode_image(params['visual'], pixels, spec, taps)
        text = clip.KIND.encode_text(params['text'], tokens, spec)
        logits = jnp.exp(params['logit_scale']) * (
            l2_normalize(image['embedding']) @ l2_normalize(text).T
        )
        streams = [image['stem'], *image['outputs']]
        return {
            **{f'outputs/vision_stream.{i}': stream for i, stream in enumerate(streams)},
            'outputs/image_embedding': image['embedding'],
            'outputs/text_embedding': text,
            'outputs/logits_per_image': logits,
            'outputs/logits_per_text': logits.T,
        }

    pixels = golden.tensors['inputs/pixel_values'].transpose(0, 2, 3, 1)
    outputs = forward(params, pixels, golden.tensors['inputs/text_tokens'])
    return {name: np.asarray(value) for name, value in outputs.items()}


def _container(golden: Golden) -> Path:
    """The checkpoint beside the recorded file."""
    folder = golden.file.parent
    others = [file for file in folder.iterdir() if file.suffix in _SUFFIXES and file != golden.file]
    if not others:
        raise FileNotFoundError(f'{folder}: no checkpoint beside {golden.file.name}')
    return others[0] if len(others) == 1 else folder
