"""The search: baselines, a global phase, a local phase, an answer (AutoQRA).

`search` tells it by its phases, `exploring` and `refining`; beside them lies what they are told by: settings, state,
asking, measuring, promotion, stopping and answer. The loop knows strategies only by their contracts, and is resumed by
running it again: the journal answers what was measured and decided before.
"""

from qratk.loop.search import SearchLoop

__all__ = ["SearchLoop"]
