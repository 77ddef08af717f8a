"""Backends: the native pump on the CPU, and accelerators through CUDA and Triton. No files, recipes, methods."""
