"""The user's ``env.py``: prepare it, read it, and run it."""
