"""Several processes under torchrun as one job; a single process is a job of size 1."""
