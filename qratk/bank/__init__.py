"""The bank: every projection packed at every bit-width, its dequantised cache, and its files."""
