"""`dist_jax features`."""
