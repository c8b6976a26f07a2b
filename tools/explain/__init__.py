"""From recorded runs to a merge table of one's own: LIVAR's SHAP analysis, made reproducible.

Imports run one way: records -> merging -> targets, records -> rows -> forest -> table -> report -> __main__.
"""
