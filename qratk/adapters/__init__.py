"""Adapters over packed weights: methods such as LoRA and AdaLoRA, what they begin with, and how they are stored."""
