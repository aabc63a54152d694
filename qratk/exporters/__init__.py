"""Forms in which other tools take what was trained: an open set, one file a form."""
