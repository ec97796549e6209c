"""Fuzzing the readers of untrusted files and folders, and the names of files on their way to tables and pages; see ``__main__``."""
