"""Checks of `tools.check_parity`, one module a family."""
