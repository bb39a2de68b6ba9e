"""Experiment configurations: one file per model family, one row per released result."""
