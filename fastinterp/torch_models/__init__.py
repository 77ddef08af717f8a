"""Merged weights in torch modules: loaded, or moved along a path while the module is in use."""
