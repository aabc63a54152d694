"""Local refiners: which configurations to try in phase II. One file a strategy."""
