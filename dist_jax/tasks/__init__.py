"""What a run may learn."""
