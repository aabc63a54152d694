"""Mutation operators: how a configuration is varied. One file a strategy."""
