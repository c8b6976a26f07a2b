"""LIVAR: variance-weighted heads and score-weighted adapters."""

from strategies.livar.strategy import Livar, LivarConfig
from strategies.livar.table import PUBLISHED_TABLE, MergeTable, read_table
from strategies.livar.weights import class_merge_weights, lora_merge_weights, per_layer_scores, score_bounds
from strategies.merging import merge_adapter, merge_head

__all__ = [
    "PUBLISHED_TABLE",
    "Livar",
    "LivarConfig",
    "MergeTable",
    "class_merge_weights",
    "lora_merge_weights",
    "merge_adapter",
    "merge_head",
    "per_layer_scores",
    "read_table",
    "score_bounds",
]
