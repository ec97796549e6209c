"""The embedded benchmark: scenes drawn and rendered on the spot, in the layout of the i-CLEVR folder."""
