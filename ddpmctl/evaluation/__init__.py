"""Scores: classifiers, what they find in sampled images, and the results kept beside the checkpoints."""
