"""Checkpoints: files, headers, names; no tensor arithmetic."""
