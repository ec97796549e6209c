"""The embedded benchmark: random scenes, rendered in the style of i-CLEVR."""
