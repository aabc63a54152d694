"""Memory foretold: exact bytes of a configuration, and traced peaks of training it."""
