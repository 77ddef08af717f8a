"""The operations of the engine in Triton: kernels over addresses. Launched by fastinterp.backends.triton."""
