"""What the user wants: recipes, read strictly and without touching a checkpoint."""
