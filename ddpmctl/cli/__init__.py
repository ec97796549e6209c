"""The command line: one module a command, and ``terminal``, the only one that knows rich."""
