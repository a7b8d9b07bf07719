"""Settings and the address of the database."""
