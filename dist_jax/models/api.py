"""What a model family offers to the train step, and the letters used for shapes.

B clips     T input frames      t frames the frozen backbone sees      H, W pixels
L tokens of a frame (class token first)     K tapped blocks     h heads     d head dim
C channels of the trainable network         E embedding of a clip
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from dist_jax.models.frozen import Frozen
from dist_jax.models.layers import Pixels
from dist_jax.sharding import ShardingRule

Tree = Any


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    """How the parameters whose path matches `pattern` are optimised.

    Attributes:
      pattern: regular expression searched in 'a/b/kernel' paths; the first matching group counts.
      weight_decay: multiplier of the recipe's weight decay.
      learning_rate: multiplier of the schedule.
    """

    pattern: str
    weight_decay: float = 1.0
    learning_rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class TensorAxes:
    """Which axes of an array number tensors that lie in it one beside the other.

    Attributes:
      pattern: regular expression searched in 'a/b/kernel' paths; the first matching one counts.
      axes: a layer of a stack, or q, k, v where each has a matrix of its own; not negative.
    """

    pattern: str
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """One model family at one size. The train and eval steps call these and nothing else.

    Attributes:
      net: the trainable network. `net.apply(variables, inputs, mask=..., train=...)` returns a dict
        of what the task reads: `logits`, a tuple of float32 (B, num_classes), one entry a head,
        and `embedding` (B, E). `inputs` is what `frozen.apply` returns, or the batch itself; mask
        (B,) is 1 where a clip is real, or None where all are: what a network gathers over a batch
        leaves the others out, and stays as it was where no clip is (`batch_norm` does both).
        Classifiers are a `heads.Head` of the name `head`, whose classes
        `init_from` knows by name; no other module has that name.
      dtype: compute dtype.
      pixels: how it wants its pixels.
      param_groups: must cover every trainable parameter.
      sharding_rules: likewise; where they lie on a mesh. Other collections lie on every device.
      tensor_axes: where one array of the parameters is several tensors of the network as its
        authors have it; what none matches is one tensor. Read where each tensor is clipped.
      most: path of a parameter -> what no element of it may exceed after an update.
      frozen: what it reads and never changes; None for a network that stands alone.
      from_backbone: subtrees of the parameters that start as parts of the converted backbone, path
        -> path there. They are trained from there; shapes and layouts agree.
      fit: (path, stored array, shape) -> array of that shape: how a parameter or statistic of a run
        or checkpoint that another size of this family wrote starts here (a kernel over more frames,
        a table of other positions); ValueError where it cannot. None where only equal shapes can
        be taken.
      left_behind: regular expressions searched in 'a/b/kernel' paths: what of another network's run
        or checkpoint training starts without. Everything else there must have a place here.
      begin: {'params': ..., **collections} of the run or checkpoint that training starts from ->
        what it starts with, of the same structure, shapes and dtypes; None for as they are. Neither
        a run that goes on nor an evaluation calls it.
      attention: (variables of `net`, inputs as for it) -> float32 (B, t, g, g), the share of the
        query's attention on each patch of each frame that the backbone sees. Non-negative; the sum
        over (t, g, g) is at most 1, class tokens have the rest. t divides T, and map i belongs to
        input frame i * T // t. None where no query looks at patches.
    """

    net: nn.Module
    dtype: Any
    pixels: Pixels
    param_groups: tuple[ParamGroup, ...]
    sharding_rules: tuple[ShardingRule, ...]
    tensor_axes: tuple[TensorAxes, ...] = ()
    most: Mapping[str, float] = dataclasses.field(default_factory=dict)
    frozen: Frozen | None = None
    from_backbone: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fit: Callable[[str, jax.Array, tuple[int, ...]], jax.Array] | None = None
    left_behind: tuple[str, ...] = ()
    begin: Callable[[Tree], Tree] | None = None
    attention: Callable[[Tree, Tree], jax.Array] | None = None

    def normalize(self, video: jax.Array) -> jax.Array:
        """Pixels 0 to 255, uint8 or float -> what `inputs` takes as `video`."""
        return self.pixels.normalize(video, self.dtype)

    def inputs(self, frozen: Tree, batch: Mapping[str, jax.Array]) -> Tree:
        """What the network reads of a batch. No gradient may flow into it: that is the step's part.

        Args:
          frozen: the frozen tree, {} where there is none.
          batch: `video` (B, T, H, W, 3), or rows of them, (B, T, H, 3 W), see `layers.as_rows`;
            normalised. And what else the task lets the network see.
        """
        return batch if self.frozen is None else self.frozen.apply(frozen, batch)
