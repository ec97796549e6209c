"""The 24 labels, the lab's folder layout, the embedded benchmark and the decoded cache."""
