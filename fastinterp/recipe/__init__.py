"""Recipes: the description of a merge, read strictly and without touching a checkpoint."""
