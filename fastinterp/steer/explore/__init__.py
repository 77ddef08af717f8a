"""A local page to steer a language model with: sliders for directions, and what the model writes."""
