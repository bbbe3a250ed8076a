"""The command line: one module for each command, what they share, and `main`, which finds them."""
