"""Verify backups: read them back, or restore and compare them."""
