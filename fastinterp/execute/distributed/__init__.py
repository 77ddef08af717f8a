"""One merge by several processes that share a file system."""
