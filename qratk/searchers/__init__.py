"""Global searchers: which configurations to try in phase I. One file a strategy."""
