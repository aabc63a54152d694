"""The embedded default: a tiny language model and a data set, so that a first search needs neither.

Importing this package loads no torch.
"""

from qratk.embedded.data import model_directory, write_dataset

__all__ = ["model_directory", "write_dataset"]
