"""Importance estimators: how much a layer matters for its bit-width or its rank. One file a strategy."""
