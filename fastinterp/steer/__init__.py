"""The path between models: swept to disk, loaded into memory, walked by a module that is in use."""
