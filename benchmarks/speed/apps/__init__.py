"""Flower apps that stand beside this one: what a user would pick instead, and nothing at all."""
