"""Training: the LightningModule, candidates side by side, and several devices."""
