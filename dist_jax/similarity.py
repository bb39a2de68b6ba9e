"""How alike sentences and videos are: by words and frames (`wti`), or by one vector each (`meanP`).

Source: Yao et al. (arXiv:2311.15769) after Wang et al., "Disentangled Representation Learning for
Text-Video Retrieval" (arXiv:2203.07111), and the retrieval code of Side4Video's release. N
sentences of S words, M videos of T frames, words t and frames v of unit length:

    meanP    s = (pooled sentence) . (mean of the frames), both of unit length after that
    wti      R[p, q] = t_p . v_q
             s = (sum over p of a_p max over q of R + sum over q of b_q max over p of R) / 2

with a and b a softmax of the logits of real words and frames. No logit scale anywhere here.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from dist_jax.models.layers import einsum_to_float32, widened
from dist_jax.sharding import everywhere, parts_here, split_batch

INTERACTIONS = ('wti', 'meanP')
# What the pair of a word and a frame counts of which one is none: as in the release 0, which is the
# largest where all real pairs are negative; or it does not count.
MASKED = ('zero', 'ignore')

CDCR_SCALE = 0.11  # what the release multiplies its diagonal term by

# Products of words and frames that are in memory at once, of a device. On v4 the compiler keeps
# what fits in 128 MiB beside the HBM: with 48 and 192 MiB, 4,096 pairs take 5 and 24 % longer.
BLOCK_BYTES = 96 * 2**20
_LOWEST = -1e30  # less than any logit; finite, so that rows without anything real are


@flax.struct.dataclass
class Texts:
    """N embedded sentences.

    Attributes:
      words: (N, S, E), of any length.
      mask: (N, S), 1 for real words.
      logits: (N, S) float32, of the weights of words.
      pooled: (N, E), of any length.
    """

    words: jax.Array
    mask: jax.Array
    logits: jax.Array
    pooled: jax.Array


@flax.struct.dataclass
class Videos:
    """M embedded videos.

    Attributes:
      frames: (M, T, E), of any length.
      mask: (M, T), 1 for real frames.
      logits: (M, T) float32, of the weights of frames.
    """

    frames: jax.Array
    mask: jax.Array
    logits: jax.Array


def similarity(
    texts: Texts, videos: Videos, interaction: str = 'wti', masked: str = 'zero'
) -> jax.Array:
    """Float32 (N, M), without the logit scale.

    Under a mesh, both are split over devices; sentences stay so, and every device gets what is
    compared of all videos: unit frames and their weights, or their means. With wti, the products of
    words and frames (N, M, S, T) are made a block of sentences at a time, and again in the backward
    pass.

    Args:
      texts: the sentences.
      videos: the videos.
      interaction: one of `INTERACTIONS`.
      masked: one of `MASKED`; of meanP, whether frames that are none count in the mean.
    """
    return {'wti': _wti, 'meanP': _mean_pooled}[interaction](texts, videos, masked)


def _mean_pooled(texts: Texts, videos: Videos, masked: str) -> jax.Array:
    frames = widened(videos.frames)
    if masked == 'ignore':
        counted = videos.mask[..., None]
        mean = (frames * counted).sum(1) / jnp.maximum(counted.sum(1), 1)
    else:
        mean = frames.mean(1)
    mean = everywhere(unit(mean).astype(texts.pooled.dtype))
    return einsum_to_float32('ne,me->nm', unit(texts.pooled), mean)


def _wti(texts: Texts, videos: Videos, masked: str) -> jax.Array:
    text_weights = weights(texts.logits, texts.mask)
    words = unit(texts.words) * texts.mask[..., None].astype(texts.words.dtype)
    frames = unit(videos.frames) * videos.mask[..., None].astype(videos.frames.dtype)
    frames, video_weights, real = everywhere(
        (frames, weights(videos.logits, videos.mask), videos.mask)
    )
    video_weights = video_weights.T
    frames = widened(frames.swapaxes(0, 1))  # gradients of all blocks are summed in float32
    lowered = masked == 'ignore'

    # Videos are the last axis of all products: 12 frames would fill a tenth of a register.
    @jax.checkpoint
    def block(part: tuple[jax.Array, ...]) -> jax.Array:
        words, mask, text_weights = split_batch(part)
        products = einsum_to_float32('nse,tme->tnsm', words, frames.astype(words.dtype))
        of_frames = of_words = products
        if lowered:
            of_frames = jnp.where(real.T[:, None, None] > 0, products, _LOWEST)
            of_words = jnp.where(mask[:, :, None] > 0, products, _LOWEST)
        # XLA:CPU of jaxlib 0.10.2 computes wrong sums where it fuses all of this with the products:
        # https://github.com/jax-ml/jax/issues/39103
        best = jax.lax.optimization_barrier((of_frames.max(0), of_words.max(2)))
        by_word = (text_weights[..., None] * best[0]).sum(1)
        by_frame = (video_weights[:, None] * best[1]).sum(0)
        return 0.5 * (by_word + by_frame)

    rows = words, texts.mask, text_weights
    (count, length), (num_frames, num_videos) = texts.mask.shape, frames.shape[:2]
    parts = _parts(count, 4 * length * num_frames * num_videos)
    # Block i has sentences i, i + parts, ...: each device has as many of its own in all of them.
    blocks = jax.tree.map(
        lambda x: x.reshape(count // parts, parts, *x.shape[1:]).swapaxes(0, 1), rows
    )
    found = jax.lax.map(block, blocks)
    return split_batch(found.swapaxes(0, 1).reshape(count, num_videos))


def _parts(count: int, row_bytes: int) -> int:
    """Blocks that so many rows are cut into: the fewest that divide them and are small enough."""
    devices = parts_here()
    own = count // devices if count % devices == 0 else count
    fitting = (parts for parts in range(1, own + 1) if own % parts == 0)
    return next((p for p in fitting if own // p * row_bytes <= BLOCK_BYTES), own)


def unit(x: jax.Array) -> jax.Array:
    """Rows of unit length in the dtype of `x`; rows of zeros stay."""
    wide = widened(x)
    square = jnp.square(wide).sum(-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))).astype(x.dtype)


def weights(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis of what is real; equal ones where nothing is."""
    return jax.nn.softmax(jnp.where(mask > 0, logits, _LOWEST))


def decorrelation(texts: Texts, videos: Videos, mask: jax.Array) -> jax.Array:
    """The release's term on channels of words and frames that belong together, a scalar.

    Of matched pairs (i, i), the partner of a word is the frame that it is most like, and the other
    way round. Channels of words and of their partners, each standardised over all of them, should
    agree: 0.11 * sum over channels of (c - 1)^2, c the mean over both ways of their weighted
    product. Only the diagonal of the release's matrix has a weight.

    Source: Wang et al. (arXiv:2203.07111), section 3.3; the release.

    Args:
      texts: (B, ...).
      videos: (B, ...), of the same pairs.
      mask: (B,), 1 where a pair is real.
    """
    words, frames = unit(texts.words), unit(videos.frames)
    products = einsum_to_float32('bse,bte->bst', words, frames)
    # As in the release, a partner may be none, where all real ones are less alike than 0.
    products = products * texts.mask[:, :, None] * videos.mask[:, None]
    count = jnp.maximum(mask.sum(), 1.0)

    def along(
        own: jax.Array, other: jax.Array, partner: jax.Array, logits: jax.Array, real: jax.Array
    ) -> jax.Array:
        taken = jnp.take_along_axis(other, partner[..., None], axis=1)
        counted = (real * mask[:, None])[..., None]
        weighted = weights(logits, real)[..., None] * counted
        products = _standardised(widened(own), counted) * _standardised(widened(taken), counted)
        return (weighted * products).sum((0, 1)) / count

    by_word = along(words, frames, products.argmax(2), texts.logits, texts.mask)
    by_frame = along(frames, words, products.argmax(1), videos.logits, videos.mask)
    return CDCR_SCALE * jnp.square((by_word + by_frame) / 2 - 1).sum()


def _standardised(x: jax.Array, counted: jax.Array) -> jax.Array:
    """(B, n, E) without its mean over what counts, over its unbiased deviation; no epsilon."""
    count = counted.sum()
    centred = x - (x * counted).sum((0, 1)) / jnp.maximum(count, 1.0)
    variance = (jnp.square(centred) * counted).sum((0, 1)) / jnp.maximum(count - 1, 1.0)
    return centred * jax.lax.rsqrt(jnp.where(variance > 0, variance, 1.0))
