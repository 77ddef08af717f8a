"""Output folders: their files, and how they are written."""
