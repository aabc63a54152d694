"""Evaluators: how a configuration gets its score. One file a strategy."""
