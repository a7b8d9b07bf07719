"""The image, looked at from outside: what is in it, how it may be run, how it is built."""
