"""Sampling images from a trained network."""
