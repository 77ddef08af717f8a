"""What computes: the native pump on the CPU, accelerators through CUDA and Triton. No files, recipes, methods."""
