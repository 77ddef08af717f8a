"""The backend for accelerators through Triton: memory, streams and launches of the kernels in fastinterp._triton."""
