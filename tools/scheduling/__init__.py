"""Lengths of compiled kernels; the command is `tools.kernel_schedule`."""
