"""What scores are worth: intervals, comparisons and choices that respect how few images there are."""
