"""How `dist_jax dataset merge-kinetics` makes one data set of three."""
