"""Videos through a model, each once: what `index`, `features` and `predict --window` do alike."""
