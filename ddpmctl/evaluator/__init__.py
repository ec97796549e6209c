"""The classifier that scores images, and what is computed from its answers."""
