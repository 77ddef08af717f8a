"""Resuming a merge that was killed: what an unfinished output is of, what of it is finished, and whether it is sound."""
