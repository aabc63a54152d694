"""Curvature of frozen weights in a stream; `curvature` imports torch, so it is imported only when it is used."""
