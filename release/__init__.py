"""What makes and describes a release: wheels tried as users install them, their parts, hashes of the tools."""
