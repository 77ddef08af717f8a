"""Whole commands raced against each other: `fastinterp bench`. Kernel benchmarks are in benchmarks/."""
