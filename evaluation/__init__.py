"""Scores held against a truth: metrics, thresholds and what is shown of them."""
