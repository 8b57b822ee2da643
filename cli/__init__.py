"""The command line: parse, build a config, one library call, render."""
