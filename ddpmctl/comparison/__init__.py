"""Comparison of runs: by recorded scores, and by new images on the same noise."""
