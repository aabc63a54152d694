"""Integer programs over a problem: exact choices of bits and ranks under the budget."""
