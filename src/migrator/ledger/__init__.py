"""The ledger: the table that records who changed the schema, when and how."""
