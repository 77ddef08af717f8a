"""What a merge will read, compute and write, decided from headers alone."""
