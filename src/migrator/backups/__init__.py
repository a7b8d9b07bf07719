"""Backups: dumps that were read back, their manifests, the place that holds them, and the restore."""
