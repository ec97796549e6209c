"""Models as files of other programs, each proven equal before it is left behind."""
