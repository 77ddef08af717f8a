"""The path between models: swept to disk, loaded into memory, walked by a module in use, measured, drawn, explored."""
