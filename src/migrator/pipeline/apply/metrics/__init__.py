"""What each revision did: statements, tables, locks and time."""
