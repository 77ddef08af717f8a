"""Checkpoints in and out, without tensor arithmetic."""
