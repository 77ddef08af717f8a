"""A local page to explore a path of language models with: sliders for directions, and what the model writes."""
