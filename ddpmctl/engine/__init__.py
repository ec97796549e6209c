"""Training, sampling, evaluation and comparison; everything here yields events and prints nothing."""
