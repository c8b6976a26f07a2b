"""Labelled images: where they lie, who holds which, and how they become batches."""
