"""Pocketune's exporter: one capture of the training step, lowered to runtimes that phones and boards have."""
