"""What adapters begin with where they make up for the quantisation error: one file a start."""
