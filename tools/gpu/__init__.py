"""The other side of `tools.compare_gpu`."""
