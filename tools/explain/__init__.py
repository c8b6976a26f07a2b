"""From recorded runs to a merge table of one's own: LIVAR's SHAP analysis, made reproducible.

Imports run one way: records and merging -> calibration and learning -> targets; rows -> forest; table; plots, progress
and summary -> analysis -> __main__.
"""
