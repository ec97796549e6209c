"""The Python interface, and the choices that it shares with the command line: which checkpoint, conditions, classifier and device."""
