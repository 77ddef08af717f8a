"""What makes and describes a release: the wheel tried as a user installs it, the list of what is in it, hashes of the tools."""
