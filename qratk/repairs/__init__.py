"""Repair policies: how an infeasible configuration is brought back under the budget. One file a strategy."""
