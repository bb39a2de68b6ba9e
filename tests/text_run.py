"""A short run of DiST with a text head on built-in clips of 8 frames, two views of 4 each."""

import pytest

from dist_jax import train
from dist_jax.configs import dist
from input_pipeline import motion_clips


def train_in(folder, num_val, **data):
    """(folder of the clips, workdir) in `folder`; `data` are further fields of the group.

    The run writes no report; other tests show those of training.
    """
    clips, workdir = folder / 'data', str(folder / 'run')
    motion_clips.generate(clips, num_train=8, num_val=num_val, size=48, num_frames=8)
    config = dist.get_config('demo')
    config.update(batch_size=8, num_steps=2)
    config.data.update(
        root=str(clips),
        train_list='train.txt',
        label_map='labels.txt',
        num_frames=4,
        image_size=48,
        **data,
    )
    config.model.update(head='text', temporal_dim=8, unroll=False)
    config.eval.update(num_clips=2, batch_size=8)
    config.optimizer.peak_lr = 1e-2  # scores that differ between videos
    config.log.tensorboard = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
        train.train(config, workdir)
    return clips, workdir
