"""The commands, one file each, on one parser: the only package that knows every part."""
