"""The application: only its models are here."""
