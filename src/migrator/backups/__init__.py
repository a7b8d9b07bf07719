"""Backups: dumps that have been read back, their manifests, the folder they live in, and the way back."""
