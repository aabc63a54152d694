"""Recipes x budgets x seeds: run as searches, read back from their files, told as tables and figures."""
