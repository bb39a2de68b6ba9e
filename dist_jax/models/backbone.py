"""What families read from a frozen backbone, whatever kind it is.

A kind (`clip`) says of its networks how they are described, made, resized and run. A `Backbone` is
one of them at one size, and families see nothing else of it: its `spec`, `encode_image`, `pixels`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from dist_jax.models.layers import Pixels, as_rows
from dist_jax.models.patch_kernel import patches_of
from dist_jax.models.stack import Reading
from dist_jax.sharding import ShardingRule, Tree


class Spec(Protocol):
    """Geometry of a backbone: a frozen dataclass of JSON values, with at least these.

    A kind with a text tower also has `context_length`, the tokens that it reads.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    embed_dim: int

    @property
    def grid(self) -> int:
        """Patches along one side."""

    @property
    def num_tokens(self) -> int:
        """Tokens of one frame, the class token included."""


def check_image_size(height: int, width: int, spec: Spec) -> None:
    """Raises ValueError unless frames of this size are what the spec is for."""
    if (height, width) != (spec.image_size, spec.image_size):
        raise ValueError(
            f'frames of {height}x{width} pixels for a backbone of image_size={spec.image_size}; '
            'set data.image_size or resize the position table'
        )


@dataclasses.dataclass(frozen=True)
class Taps:
    """What a consumer reads from the image tower; the rest is not computed or not kept.

    Attributes:
      outputs: blocks whose output stream is returned.
      apart: outputs are `token` (K, N, W) and `patches` (K, N, L - 1, W) in place of one array.
      standardised: outputs are of mean 0 and variance 1 over W.
      attention: blocks whose queries and keys are returned (bias included, not scaled).
      summary: applied to queries and keys (N, L, h, d) inside each of these blocks; its result is
        returned in their place, so that they are not kept. None returns them.
      stem: whether the stream before the first block is returned.
      class_token: whether the class token behind the last block is returned; it needs every block.
      embedding: whether the projected class embedding is returned; it needs every block.
    """

    outputs: tuple[int, ...] = ()
    apart: bool = False
    standardised: bool = False
    attention: tuple[int, ...] = ()
    summary: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    stem: bool = False
    class_token: bool = False
    embedding: bool = False

    @property
    def reading(self) -> Reading:
        """What is kept of the streams."""
        return Reading(self.apart, self.standardised)

    def names(self) -> tuple[str, ...]:
        """Of what `Kind.encode_image` returns for these."""
        attention = ('queries', 'keys') if self.summary is None else ('attention',)
        asked = {
            'stem': self.stem,
            'outputs': self.outputs,
            **dict.fromkeys(attention, self.attention),
            'class_token': self.class_token,
            'embedding': self.embedding,
        }
        return tuple(name for name, wanted in asked.items() if wanted)

    def blocks_needed(self, depth: int) -> int:
        """How many blocks have to run."""
        asked = (*self.outputs, *self.attention)
        for block in asked:
            if not 0 <= block < depth:
                raise ValueError(
                    f'tap of block {block}, but the backbone has blocks 0..{depth - 1}'
                )
        for name in ('outputs', 'attention'):
            blocks = getattr(self, name)
            if list(blocks) != sorted(set(blocks)):
                raise ValueError(f'taps {name}={blocks} must be increasing, without repeats')
        whole = self.embedding or self.class_token
        return depth if whole else max(asked, default=-1) + 1


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of backbone.

    Its trees have the image tower under `visual` and, where there is one, the text tower under
    `text` with the logarithm of its scale as `logit_scale`.

    Attributes:
      specs: published sizes, by name.
      spec_class: of `specs`; made of the `spec` that a converted checkpoint holds.
      geometry: fields of the spec that a name stands for, whatever the image size is.
      pixels: how the image tower wants its pixels.
      sharding_rules: of its trees, whole or one layer, and of class text features.
      init_params: (random key, spec) -> tree in float32.
      tables: leaves of the tree whose shape depends on the image size; () for none.
      resize: (a table, as stored, spec) -> the table at the spec's image size.
      encode_image: (`visual`, pixels (N, H, W, 3) or `layers.patchify` of them (N, g*g, p*p*3),
        spec, taps, unroll=, remat=) -> what the taps ask for, as `clip.encode_image` returns it.
        What this kind does not have (queries and keys of convolutions) is left out.
      projection: subtrees of `visual` behind the last block, the norm and the map to the embedding.
      project_image: (those of `visual`, class tokens (N, W) behind the last block) -> float32
        (N, E).
      encode_text: (`text`, tokens (n, S) int32, spec) -> float32 (n, E); None without a text tower.
      encode_words: (`text`, tokens, spec, dtype=, unroll=, remat=) -> the embeddings of all tokens,
        (n, S, E) of that dtype, which may be trained; likewise.
    """

    specs: Mapping[str, Spec]
    spec_class: Callable[..., Spec]
    geometry: tuple[str, ...]
    pixels: Pixels
    sharding_rules: tuple[ShardingRule, ...]
    init_params: Callable[[jax.Array, Any], Tree]
    tables: tuple[str, ...]
    resize: Callable[[Any, Any], Any]
    encode_image: Callable[..., dict[str, jax.Array]]
    projection: tuple[str, ...] = ()
    project_image: Callable[[Tree, jax.Array], jax.Array] | None = None
    encode_text: Callable[..., jax.Array] | None = None
    encode_words: Callable[..., jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A backbone at one size.

    Attributes:
      kind: what it is.
      spec: geometry, at the image size of the experiment.
      path: of the converted checkpoint; '' where there are shapes alone.
      name: as it was converted; likewise.
      params_sha256: of its weights; likewise.
    """

    kind: Kind
    spec: Any
    path: str = ''
    name: str = ''
    params_sha256: str = ''

    def identity(self) -> dict[str, Any]:
        """What a checkpoint says of the backbone that it was trained on."""
        return {
            'name': self.name,
            'path': self.path,
            'params_sha256': self.params_sha256,
            'spec': dataclasses.asdict(self.spec),
        }

    def at(self, image_size: int) -> Backbone:
        """The same for another image size.

        Raises:
          ValueError: its patches do not divide that.
        """
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, image_size=image_size))

    def abstract_params(self) -> Tree:
        """The converted tree at this image size, as float32 `jax.ShapeDtypeStruct` leaves."""
        return jax.eval_shape(lambda: self.kind.init_params(jax.random.key(0), self.spec))

    def encode_image(
        self,
        params: Tree,
        pixels: jax.Array,
        taps: Taps,
        *,
        unroll: bool = False,
        remat: bool = False,
    ) -> dict[str, jax.Array]:
        """Runs the image tower; see `Kind.encode_image`.

        Raises:
          ValueError: a tap asks for what this kind does not have.
        """
        found = self.kind.encode_image(params, pixels, self.spec, taps, unroll=unroll, remat=remat)
        lacking = [name for name in taps.names() if name not in found]
        if lacking:
            raise ValueError(
                f'the model reads {" and ".join(lacking)} of its backbone, and this kind has none; '
                'take a backbone.name of another kind, or set the fields of config.model so that '
                'it does not read them'
            )
        return found

    def patches(self, clips: jax.Array) -> jax.Array:
        """`layers.patchify` of clips: (B, T, g*g, p*p*3).

        Args:
          clips: (B, T, H, W, 3), or rows of them, see `layers.as_rows`.

        Raises:
          ValueError: the image size is not the spec's.
        """
        rows = as_rows(clips)
        check_image_size(rows.shape[2], rows.shape[3] // 3, self.spec)
        return patches_of(rows, self.spec.patch_size)

    def embed_frames(
        self, params: Tree, video: jax.Array, *, unroll: bool = False, remat: bool = False
    ) -> jax.Array:
        """The embedding of each frame of clips, not of unit length.

        Args:
          params: the `visual` subtree.
          video: clips as `patches` takes them, normalised, in the compute dtype.
          unroll: see `stack`.
          remat: see `clip.encode_image`.

        Returns:
          float32 (B, T, E).
        """
        patches, taps = self.patches(video), Taps(embedding=True)
        frames = patches.reshape(-1, *patches.shape[2:])
        found = self.encode_image(params, frames, taps, unroll=unroll, remat=remat)
        return found['embedding'].reshape(*patches.shape[:2], -1)

    def check_trained_text(self, family: str) -> None:
        """Raises ValueError if there is no text tower, which `family` would train."""
        if self.kind.encode_words is None or not getattr(self.spec, 'text_depth', 0):
            raise ValueError(
                f'model.family={family!r} trains the text tower of its backbone, and this backbone '
                'has none; take another backbone.name, and convert it with its text tower'
            )
