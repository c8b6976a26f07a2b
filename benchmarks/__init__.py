"""Measurements; one command each."""
