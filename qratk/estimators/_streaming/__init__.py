"""Gradients of frozen weights in a stream; `gradients` imports torch, so it is imported only when it is used."""
