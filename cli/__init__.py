"""The command line, `offloop`: parses arguments and prints results."""
