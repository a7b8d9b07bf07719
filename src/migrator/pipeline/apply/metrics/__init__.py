"""The measurement of each revision: statements, tables, locks and time."""
