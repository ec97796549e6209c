"""Training runs: what a run is, its loop, its files, and how one goes on."""
