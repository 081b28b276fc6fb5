"""The built-in models: scenes, renderer, training script, weights, and the judges of quality."""
