"""What the input pipeline is measured with and against."""
