"""What the documentation site is made with, besides MkDocs: equations, and the reference of all config keys.

Imports run one way: schemas and presets -> reference -> __main__; ``hooks`` is called by MkDocs alone.
"""
