"""The networks; each takes ``(x_t (B, 3, H, W), labels (B, 24), t / T (B,))`` and returns (B, 3, H, W)."""
