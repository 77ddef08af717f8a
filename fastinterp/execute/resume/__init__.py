"""Resuming a run that was killed: of which run an output is, what of it is finished, and whether that is sound."""
