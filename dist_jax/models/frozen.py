"""The frozen part of a model: from a converted backbone to the tree that the steps read.

visual          the image tower, matrices in the compute dtype, norms in float32
text            with a text head: for each head float32 (num_classes, E), of unit length, or the
                difference of such a feature and a neutral one (`ClassTexts.neutral`)
logit_scale     likewise, a logarithm
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dist_jax.models import converted
from dist_jax.models.backbone import Backbone
from dist_jax.models.layers import exact_float32, l2_normalize
from dist_jax.models.params import flatten, in_precision, unflatten, with_precision
from dist_jax.sharding import (
    FSDP,
    TENSOR,
    ShardingRule,
    Tree,
    check_replicated_share,
    on_mesh,
    place,
    replicated,
    shardings,
)
from input_pipeline.class_names import as_words
from input_pipeline.tokenizer import tokenize

log = logging.getLogger('dist_jax')

TOWER = 'visual'
TEXT = ('text', 'logit_scale')
ROWS = 128  # class texts that are encoded at once, so that a long label list needs little memory


@dataclasses.dataclass(frozen=True)
class ClassTexts:
    """Class names as a text tower reads them.

    Attributes:
      names: of the classes of each head.
      split_names: put spaces between the words of names that have none.
      truncate: cut those that are too long for the text tower.
      neutral: a text that says nothing of any class, whose feature is taken off those of all. A
        logit then says how much nearer a clip is to the class than to that text: 0 for as near,
        whatever other classes there are. '' for none.
    """

    names: tuple[tuple[str, ...], ...] = ()
    split_names: bool = True
    truncate: bool = False
    neutral: str = ''

    def tokens(self, context_length: int) -> tuple[np.ndarray, ...]:
        """(num_classes, context_length) int32 of each head.

        Source: DiST uses the bare label text without double quotes.

        Raises:
          ValueError: there are no names, or a text is too long.
        """
        return tuple(
            np.asarray(tokenize(self._texts(names), context_length, self.truncate))
            for names in self.names
        )

    def neutral_tokens(self, context_length: int) -> np.ndarray | None:
        """(1, context_length) int32 of the neutral text; None without one."""
        return np.asarray(tokenize([self.neutral], context_length)) if self.neutral else None

    def _texts(self, names: tuple[str, ...]) -> list[str]:
        if all(name.isdigit() for name in names):
            raise ValueError(
                'model.head=text needs class names, but the list has numbers only; '
                'pass --config.data.label_map=FILE with one name a line, or use model.head=linear'
            )
        return [name.replace('"', '') for name in (as_words(names) if self.split_names else names)]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a model reads and never changes.

    Attributes:
      backbone: whose image tower it is.
      dtype: compute dtype; what is loaded has it from the start.
      apply: (tree, batch) -> inputs of the network. The batch has `video` (B, T, H, W, 3),
        standardised, in the compute dtype, and what else the task lets the network see. Nobody
        stops gradients here: the step does.
      reads_classes: also holds features of the class names, by the text tower.
      reads_images: holds the image tower; without, its tree has class texts alone.
    """

    backbone: Backbone
    dtype: Any
    apply: Callable[[Tree, Mapping[str, Any]], Tree]
    reads_classes: bool = False
    reads_images: bool = True

    def __post_init__(self) -> None:
        if self.reads_classes and self.backbone.kind.encode_text is None:
            raise ValueError(
                'class texts (model.head=text) need a text tower, and this kind of backbone has '
                'none; take another head (model.head=linear)'
            )

    @property
    def rules(self) -> tuple[ShardingRule, ...]:
        """Where the tree lies on a mesh."""
        return self.backbone.kind.sharding_rules

    def abstract(self, num_classes: Sequence[int]) -> Tree:
        """Shapes of the tree, without any weights.

        Args:
          num_classes: of each head.
        """
        tree = {}
        if self.reads_images:
            whole = self.backbone.abstract_params()
            tree = with_precision({TOWER: whole[TOWER]}, self.dtype)
        if self.reads_classes:
            size = self.backbone.spec.embed_dim
            rows = tuple(jax.ShapeDtypeStruct((n, size), jnp.float32) for n in num_classes)
            tree |= {'text': rows, 'logit_scale': jax.ShapeDtypeStruct((), jnp.float32)}
        return tree

    def place(self, tree: Tree, mesh: Mesh) -> Tree:
        """A tree, arrays or shapes, as placed `jax.ShapeDtypeStruct` leaves.

        Raises:
          ValueError: the mesh would leave too much of it whole.
        """
        placed = place(tree, self.rules, mesh)
        check_replicated_share(placed, mesh, 'frozen weights', (FSDP, TENSOR))
        return placed

    def prepare(self, params: Tree, class_tokens: tuple[jax.Array, ...] = ()) -> Tree:
        """The tree of weights that are in memory, at the image size of the backbone.

        Args:
          params: as converted; the subtrees that are read are enough.
          class_tokens: (num_classes, S) int32 of each head, where texts are read.
        """
        tree = in_precision({TOWER: params[TOWER]}, self.dtype) if self.reads_images else {}
        return tree | self._texts(params, class_tokens) if self.reads_classes else tree

    def _texts(
        self,
        params: Tree,
        class_tokens: tuple[jax.Array, ...],
        neutral_tokens: jax.Array | None = None,
    ) -> Tree:
        text = text_features(params['text'], class_tokens, self.backbone)
        if neutral_tokens is not None:
            (neutral,) = text_features(params['text'], (neutral_tokens,), self.backbone)
            text = tuple(features - neutral for features in text)
        return {
            'text': text,
            'logit_scale': params['logit_scale'].astype(jnp.float32),
        }

    def load(self, mesh: Mesh, texts: ClassTexts, *, verify: bool = True) -> Tree:
        """Reads the tree, every device its part from the file, in the compute dtype.

        No second copy of the weights is ever on a host or a device: large arrays, and those that
        are stored in another dtype, come in slices of `converted.SLICE_BYTES`.

        Args:
          mesh: the devices.
          texts: names of the classes, where they are read.
          verify: compare the weights with the digests that were stored with them.

        Raises:
          ValueError: a class has no text or too long a one, the mesh would leave too much of the
            weights whole, or they are damaged.
        """
        if jax.process_index() == 0:
            log.info('loading the backbone %s', self.backbone.path)
        tokens = texts.tokens(self.backbone.spec.context_length) if self.reads_classes else ()
        placed = self.place(self.abstract([len(rows) for rows in tokens]), mesh)
        tree = {}
        if self.reads_images:
            tree = unflatten(load_parts(self.backbone, flatten({TOWER: placed[TOWER]}), verify))
        if not self.reads_classes:
            return tree
        return tree | self._text_features(placed, tokens, texts, mesh, verify)

    def resized(self, tree: Tree, mesh: Mesh, *, verify: bool = True) -> Tree:
        """A tree of the same weights at another image size, as this one; its tables are read anew.

        Args:
          tree: loaded, of the same backbone; all but its tables are shared.
          mesh: the devices.
          verify: see `load`.
        """
        if not self.reads_images:
            return tree
        wanted = flatten(self.place(self.abstract(()), mesh))
        return tree | unflatten(
            flatten({TOWER: tree[TOWER]}) | _load_tables(self.backbone, wanted, verify)
        )

    def with_texts(self, tree: Tree, mesh: Mesh, texts: ClassTexts, *, verify: bool = True) -> Tree:
        """A tree of the same weights with other class texts; the text tower is read anew.

        Args:
          tree: loaded, with class texts.
          mesh: the devices.
          texts: names of the classes.
          verify: see `load`.

        Raises:
          ValueError: a class has no text or too long a one, or the weights are damaged.
        """
        tokens = texts.tokens(self.backbone.spec.context_length)
        placed = self.place(self.abstract([len(rows) for rows in tokens]), mesh)
        return tree | self._text_features(placed, tokens, texts, mesh, verify)

    def _text_features(
        self,
        placed: Tree,
        tokens: tuple[np.ndarray, ...],
        texts: ClassTexts,
        mesh: Mesh,
        verify: bool,
    ) -> Tree:
        """Features of class texts and their scale. The text tower is gone when they are there."""
        stored = converted.stored_shapes(self.backbone.path)
        abstract = place({name: stored[name] for name in TEXT}, self.rules, mesh)
        params = converted.load_params(self.backbone.path, TEXT, abstract=abstract, verify=verify)
        where = shardings({name: placed[name] for name in TEXT})
        neutral = texts.neutral_tokens(self.backbone.spec.context_length)
        return jax.jit(on_mesh(mesh, self._texts), out_shardings=where)(params, tokens, neutral)


def load_parts(
    backbone: Backbone, wanted: Mapping[str, Any], verify: bool = True
) -> dict[str, jax.Array]:
    """Leaves of a converted backbone, at its image size.

    Args:
      backbone: the converted one.
      wanted: path in its tree -> leaf with the shape, the dtype and the mesh sharding to read into.
      verify: compare what is read with its digests.

    Raises:
      ValueError: there is no such leaf, or of another shape, or it is damaged.
    """
    tables = _load_tables(backbone, wanted, verify)
    rest = [path for path in wanted if path not in tables]
    if not rest:
        return tables
    abstract = unflatten({path: wanted[path] for path in rest})
    found = converted.load_params(backbone.path, rest, abstract=abstract, verify=verify)
    return flatten(found) | tables


def _load_tables(
    backbone: Backbone, wanted: Mapping[str, Any], verify: bool
) -> dict[str, jax.Array]:
    """What of `load_parts` depends on the image size, from what is stored for another one."""
    paths = [path for path in backbone.kind.tables if path in wanted]
    if not paths:
        return {}
    stored = flatten(converted.stored_shapes(backbone.path))
    stored = {
        path: jax.ShapeDtypeStruct(
            stored[path].shape,
            stored[path].dtype,
            sharding=replicated(wanted[path].sharding.mesh),
        )
        for path in paths
        if path in stored
    }
    found = flatten(
        converted.load_params(
            backbone.path, list(stored), abstract=unflatten(stored), verify=verify
        )
    )
    tables = {}
    for path, table in found.items():
        leaf = wanted[path]
        resized = backbone.kind.resize(np.asarray(table), backbone.spec)
        resized = resized.astype(leaf.dtype)
        tables[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, resized.__getitem__)
    return tables


def text_features(
    params: Tree, class_tokens: tuple[jax.Array, ...], backbone: Backbone
) -> tuple[jax.Array, ...]:
    """Features of class names by the text tower, float32 (num_classes, E) a head, of unit length.

    Args:
      params: the `text` subtree.
      class_tokens: (num_classes, S) int32 a head.
      backbone: which text tower it is.
    """
    spec = backbone.spec
    encode = jax.jit(
        exact_float32(lambda rows: l2_normalize(backbone.kind.encode_text(params, rows, spec)))
    )
    return tuple(
        jnp.concatenate([encode(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)])
        for rows in class_tokens
    )
