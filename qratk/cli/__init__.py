"""The commands, one file each, on one parser: the only package that knows every part."""

import logging

# It recommends a package for a kernel that no command needs, at every start; nothing a user must do.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
