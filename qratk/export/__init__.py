"""Models for other tools: native quantised layers, dense merged weights, and our own packed format."""
