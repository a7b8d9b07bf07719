"""The ledger: the table that says who changed the schema, when and how."""
