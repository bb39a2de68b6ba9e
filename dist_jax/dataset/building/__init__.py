"""From annotation files and videos to a data set that `input_pipeline.records` reads."""
