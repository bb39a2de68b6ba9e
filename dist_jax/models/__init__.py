"""Model families, the kinds of backbone they may stand on, and the names others give to both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dist_jax.models import (
    attentive_probe,
    clip,
    clip_params,
    dist,
    dist_params,
    eva,
    eva_params,
    evl,
    evl_params,
    fine_tune,
    frame_mean,
    side4video,
    side4video_params,
    side4video_retrieval,
    side4video_retrieval_params,
    sts,
    sts_params,
    zero_shot,
)
from dist_jax.models.api import Model


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family is built.

    Attributes:
      build: (backbone, *, num_classes, num_frames, dtype, options) -> model; without `backbone`
        where it reads none. Its keyword arguments are the fields of `config.model`.
      reads_backbone: whether it stands on a backbone.
      trains: whether it has anything to train; without, it is evaluated as it is.
      batch_statistics: whether it keeps any; `build` takes `batch_norm_groups` then, for its
        `batch_norm.BatchNorm`s.
    """

    build: Callable[..., Model]
    reads_backbone: bool = True
    trains: bool = True
    batch_statistics: bool = False


# config.model.family -> family.
FAMILIES: dict[str, Family] = {
    'attentive_probe': Family(attentive_probe.build),
    'dist': Family(dist.build),
    'evl': Family(evl.build),
    'fine_tune': Family(fine_tune.build),
    'frame_mean': Family(frame_mean.build),
    'side4video': Family(side4video.build, batch_statistics=True),
    'side4video_retrieval': Family(side4video_retrieval.build, batch_statistics=True),
    'sts': Family(sts.build, reads_backbone=False, batch_statistics=True),
    'zero_shot': Family(zero_shot.build, trains=False),
}

# `family` in the metadata of a converted backbone -> kind. Names of sizes are unique over all.
BACKBONES = {'clip': clip.KIND, 'eva': eva.KIND}

# Foreign checkpoints are recognised in this order; files of networks may hold a backbone besides.
NAMINGS = (
    *dist_params.NAMINGS,
    *evl_params.NAMINGS,
    *side4video_params.NAMINGS,
    *side4video_retrieval_params.NAMINGS,
    *sts_params.NAMINGS,
    *clip_params.NAMINGS,
    *eva_params.NAMINGS,
)
