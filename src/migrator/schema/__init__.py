"""What a live schema is, and what it is expected to be."""
