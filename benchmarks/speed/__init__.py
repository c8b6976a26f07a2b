"""How fast the app is, as ratios taken in one run; ``python -m benchmarks.speed`` runs all of it."""
