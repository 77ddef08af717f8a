"""Paths between models: swept to disk or memory, measured, drawn, explored in a browser."""
