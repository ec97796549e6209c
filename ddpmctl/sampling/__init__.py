"""Images of label sets, made by a trained network."""
