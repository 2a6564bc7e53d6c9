"""Command lines over the library."""
