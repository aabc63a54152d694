"""The model on its bank of packed weights: what a layer is, and the logits that count."""
