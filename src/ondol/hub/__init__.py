"""The control plane: what a fleet shall be, what it was, and who belongs to it."""
