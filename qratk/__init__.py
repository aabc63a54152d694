"""Joint search of per-layer bit-widths and LoRA ranks under a memory budget (AutoQRA).

Importing this package is cheap: nothing heavy is loaded before it is used.
"""

__version__ = "0.1.0"
