"""Model families and the frozen backbones they read from."""

from dist_jax.models import dist, evl, frame_mean

# Family -> build(backbone spec, *, num_classes, num_frames, dtype, options) -> VideoModel.
FAMILIES = {
    'dist': dist.build,
    'evl': evl.build,
    'frame_mean': frame_mean.build,
}
