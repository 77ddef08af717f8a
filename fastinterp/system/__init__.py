"""Properties of this machine: available memory, hardware, software and speed."""
