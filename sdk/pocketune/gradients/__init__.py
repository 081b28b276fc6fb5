"""How the gradient of a loss is had."""
