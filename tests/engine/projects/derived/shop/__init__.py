"""The application whose models its env.py imports."""
