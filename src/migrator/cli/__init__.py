"""The command line: arguments in, an exit code and text out."""
