"""Peak memory of training at the true configurations of published models, with random weights."""
