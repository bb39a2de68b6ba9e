"""What `dist_jax features` computes of a clip, by a trained run or a converted backbone."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dist_jax import checkpoint, recipe, trained
from dist_jax.embedding.embedder import Embedder, Embedding, clip_embedding
from dist_jax.models.api import Model, Tree
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.frozen import TOWER
from dist_jax.sharding import gather_params, make_mesh
from dist_jax.step import clips_of_views, jit_on_rows
from dist_jax.trained import Trained
from dist_jax.views import ViewStep
from input_pipeline.pipeline import EvalReader

CLIP, FRAMES, TOKENS = 'clip', 'frames', 'tokens'
_NO_TOWER = (
    f'--outputs: {FRAMES} and {TOKENS} are read from a frozen image tower, and this model has '
    f'none; ask for {CLIP}, or pass --backbone'
)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What is wanted of each window.

    Attributes:
      clip: one vector, (E,).
      frames: one for each frame, (T, E).
      blocks: of the image tower, from 0, increasing: their output streams, (T, L, W) each.
    """

    clip: bool = False
    frames: bool = False
    blocks: tuple[int, ...] = ()


def parse_outputs(text: str) -> tuple[Outputs, tuple[int, ...]]:
    """'clip,frames,tokens:3,tokens:-1' -> outputs without blocks, and the blocks as they are named.

    Raises:
      ValueError: something else.
    """
    names, blocks = set(), []
    for word in filter(None, (word.strip() for word in text.split(','))):
        block = re.fullmatch(rf'{TOKENS}:(-?\d{{1,4}})', word)
        if block:
            blocks.append(int(block[1]))
        elif word in (CLIP, FRAMES):
            names.add(word)
        else:
            raise ValueError(
                f'--outputs: {word!r} is not clip, frames or tokens:BLOCK, as in tokens:11 or '
                'tokens:-1 for the last block'
            )
    if not names and not blocks:
        raise ValueError('--outputs is empty; name clip, frames or tokens:BLOCK')
    return Outputs(CLIP in names, FRAMES in names), tuple(blocks)


@dataclasses.dataclass(frozen=True)
class FeatureModel:
    """A run, or a converted backbone as it is.

    Attributes:
      config: the run's or the backbone's, possibly changed.
      workdir: of the run; '' for a backbone.
      folder: of one of its steps; None likewise.
    """

    config: ConfigDict
    workdir: str = ''
    folder: epath.Path | None = None

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """JSON values that say which it is: hashes of weights, dtype."""
        if self.folder is not None:
            return trained.identity(self.config, self.folder)
        backbone = trained.backbone_of(self.config)
        return {
            'kind': 'backbone',
            'name': backbone.name,
            'sha256': backbone.params_sha256,
            'dtype': self.config.model.dtype,
        }

    def views(self, whole: bool) -> EvalReader:
        """How clips are made: all views of a `whole` video, or one of each window."""
        found = recipe.eval_reader(self.config)
        return found if whole else dataclasses.replace(found, num_clips=1, num_crops=1)

    def load(self, mesh: Mesh) -> Trained:
        """Reads the weights onto devices."""
        if self.folder is None:
            return trained.load_backbone(self.config, mesh)
        step = int(self.folder.name)
        return trained.load_trained(self.config, self.workdir, step, mesh=mesh)

    def embedder(self, outputs: Outputs, blocks: tuple[int, ...], batch_size: int) -> Embedder:
        """What embeds windows, on the devices of this process.

        Args:
          outputs: without blocks.
          blocks: of the image tower; negative ones count from its end.
          batch_size: windows of a step.

        Raises:
          ValueError: the image tower has no such block, or there is none.
        """
        mesh = make_mesh(jax.local_devices(), **self.config.mesh)
        found = self.load(mesh)
        tower = _frozen_tower(found.model)
        if blocks and tower is None:
            raise ValueError(_NO_TOWER)
        if blocks:
            outputs = dataclasses.replace(outputs, blocks=numbered(blocks, tower.spec.depth))
        run = make_feature_step(found, outputs, mesh)
        return Embedder(run, found.variables, found.frozen, mesh, batch_size)


def of_run(config: ConfigDict, workdir: str, step: int | str | None) -> FeatureModel:
    """A run; `step` is the number of a checkpoint, 'best', or None for the newest."""
    return FeatureModel(config, workdir, checkpoint.find_checkpoint(workdir, step))


def numbered(blocks: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Blocks counted from 0, increasing, each once.

    Raises:
      ValueError: there is no such block.
    """
    wrong = [block for block in blocks if not -depth <= block < depth]
    if wrong:
        raise ValueError(
            f'--outputs: tokens:{wrong[0]}, but the image tower has blocks 0 to {depth - 1}'
        )
    return tuple(sorted({block % depth for block in blocks}))


def _frozen_tower(model: Model) -> Backbone | None:
    frozen = model.frozen
    return frozen.backbone if frozen is not None and frozen.reads_images else None


def make_feature_step(found: Trained, outputs: Outputs, mesh: Mesh) -> ViewStep:
    """The jitted (variables, frozen, {'video': (B, V, T, H, W, 3) uint8}) -> float32 arrays.

    By the names of `outputs`: `clip` (B, E), the mean over views of `embed.clip_embedding`; of one
    view `frames` (B, T, E), the image embeddings as the tower or a model of retrieval gives them,
    not of unit length, and `tokens_BLOCK` (B, T, L, W), class token first.
    """
    model, plain = found.model, found.task is None
    tower = _frozen_tower(model)

    def step(variables: Tree, frozen: Tree, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        num_videos, views = batch['video'].shape[:2]
        clips = clips_of_views(model, batch['video'])
        of_net: Tree = {}
        if not plain and (outputs.clip or outputs.frames):
            gathered = gather_params(variables['params'], model.sharding_rules)
            inputs = model.inputs(frozen, {'video': clips})
            of_net = model.net.apply({**variables, 'params': gathered}, inputs)
        embedded = 'frames' not in of_net and (outputs.frames or (plain and outputs.clip))
        result: dict[str, jax.Array] = {}
        if embedded or outputs.blocks:
            if tower is None:
                raise ValueError(_NO_TOWER)
            taps = Taps(outputs=outputs.blocks, embedding=embedded)
            patches = tower.patches(clips)
            frames = patches.reshape(-1, *patches.shape[2:])
            taken = tower.encode_image(frozen[TOWER], frames, taps)
            for block, stream in zip(outputs.blocks, taken.get('outputs', ())):
                tokens = stream.reshape(num_videos, -1, *stream.shape[1:])
                result[f'{TOKENS}_{block}'] = tokens.astype(jnp.float32)
            if embedded:
                of_frames = taken['embedding'].reshape(*clips.shape[:2], -1)
                of_net = {**of_net, 'frames': of_frames}
        if outputs.frames:
            result[FRAMES] = of_net['frames'].astype(jnp.float32)
        if outputs.clip:
            result |= Embedding(clip_embedding).predict(of_net, views)
        return result

    return jit_on_rows(step, mesh, found.variables, found.frozen)
