"""Plans a step before there is hardware: compiles it for a TPU topology and reads the program.

`hlo` reads the compiled program, `flops` counts the model, `chips` and `topology` say what it is
compiled for, `compiling` builds the steps of a config and compiles them, `figures` puts the two
together, `report` prints and draws, `command` is `dist_jax plan`.
"""
