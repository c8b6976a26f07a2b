"""Comparison of methods over settings and seeds, from a study file to a table, by one command that can be interrupted.

Run: ``python -m benchmarks.study benchmarks/studies/livar_cifar100.yaml --data DIR --backbones DIR``. A *cell* is one
method in one setting with one seed: one real run through ``flwr run``. Finished cells are kept and not run again.
"""
