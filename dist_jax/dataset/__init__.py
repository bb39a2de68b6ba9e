"""`dist_jax dataset`: data sets are built, looked at, merged and made."""
