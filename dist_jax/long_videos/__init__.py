"""`dist_jax predict --window`: what is said of a video over time."""
