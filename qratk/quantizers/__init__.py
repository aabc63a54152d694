"""Quantizers: how a weight is packed and unpacked. One file a strategy."""
