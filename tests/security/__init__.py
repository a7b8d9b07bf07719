"""What a role without privileges cannot make migrator do."""
