"""Where backups are kept: a folder or a bucket."""
