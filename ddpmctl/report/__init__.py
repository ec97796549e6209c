"""Pictures and figures, as files."""
