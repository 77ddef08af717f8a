"""Merges and weighted sums of arrays and tensors that are in memory already."""
