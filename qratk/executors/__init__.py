"""Places where evaluations happen: an open set."""
