"""Values that both sides of the system share.  No I/O, no clock, no randomness."""
