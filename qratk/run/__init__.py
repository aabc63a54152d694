"""A run folder: the names of its files, its durable journal, its documents, and `Run` to open it."""
