"""Data unlike i-CLEVR, and what the five commands make of them."""
