"""Ondol runs AI inference where it belongs, and explains, meters and keeps its promises about it."""

__version__ = "0.1.0"
