"""Jobs: the state of each output tensor during execution, which yields steps and takes their results."""
