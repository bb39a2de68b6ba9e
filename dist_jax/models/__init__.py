"""Model families and the frozen backbones they read from."""
