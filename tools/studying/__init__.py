"""The study: the same small world for all families, and what became of what their papers say."""
