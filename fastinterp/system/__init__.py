"""What this machine offers, and how fast it is."""
