"""The operations of the engine in Triton: kernels over addresses. Private; fastinterp.compute.triton launches them."""
