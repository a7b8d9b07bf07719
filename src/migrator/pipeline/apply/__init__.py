"""Apply revisions through the user's own, unmodified env.py."""
