"""The SQL of each downgrade, rendered without a database, for images without the revision."""
