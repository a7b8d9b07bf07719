"""Judge whether a revision's downgrade() can be called without a database."""
