"""From lists of video files to batches of uint8 clips. Never imports jax, models or configs."""
