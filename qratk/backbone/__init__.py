"""The model: what a layer is, the bank of packed weights, the adapters, and their bytes."""
