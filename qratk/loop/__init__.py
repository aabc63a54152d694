"""The search: baselines, a global phase, a local phase, an answer (AutoQRA).

`search` tells it on two screens; beside it lie what it is told by: settings, state, measuring, promotion, stopping and
answer. The loop knows strategies only by their contracts, and is resumed by running it again: the journal answers what
was measured and decided before.
"""

from qratk.loop.search import SearchLoop

__all__ = ["SearchLoop"]
