"""Low-rank adapters as results: adapters merged with each other, and adapters extracted from fine-tunes."""
