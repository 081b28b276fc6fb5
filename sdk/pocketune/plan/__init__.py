"""What is decided before anything runs: which blocks train, which are skipped."""
