"""Checkpoint files: this program's, other programs', and how an unknown file is read safely."""
