"""dist_jax: image-to-video transfer with a frozen backbone, in JAX/Flax."""
