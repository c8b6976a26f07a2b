"""Sweeps: Hydra's multirun over real runs, from overrides to one table, by one command that can be interrupted.

Run: ``python -m tools.sweep strategy=fedavg,livar seed=1,2,3``.
"""
