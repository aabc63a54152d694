"""Promotion surrogates: which short runs deserve a long one. One file a strategy."""
