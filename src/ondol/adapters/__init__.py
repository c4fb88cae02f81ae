"""I/O behind the ports."""
