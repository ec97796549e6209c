"""Evaluation: classifiers, and the scores of sampled images."""
