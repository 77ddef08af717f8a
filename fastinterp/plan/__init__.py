"""Plans: the reads, sums and writes of a merge, decided from headers."""
