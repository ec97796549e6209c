"""The layouts of data sets, one module each."""
