"""What is tuned."""
