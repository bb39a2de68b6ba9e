"""Model families, the frozen backbones they read from, and the names that others give to both."""

from dist_jax.models import clip_params, dist, dist_params, evl, evl_params, frame_mean

# Family -> build(backbone spec, *, num_classes, num_frames, dtype, options) -> VideoModel.
FAMILIES = {
    'dist': dist.build,
    'evl': evl.build,
    'frame_mean': frame_mean.build,
}

# Foreign checkpoints are recognised in this order; a DiST file also holds the tensors of a CLIP.
NAMINGS = (
    *dist_params.NAMINGS,
    *evl_params.NAMINGS,
    *clip_params.NAMINGS,
)
