"""`dist_jax push`, and models and weights from the Hugging Face Hub."""
