"""Command-line entry points around the app."""
