"""The command line: `offloop demo`."""
