"""Adapters over packed weights: LoRA, AdaLoRA, what they begin with, and how they are stored."""
