"""Runs steps on accelerators, and on the CPU beside them."""
