"""migrator: bring a Postgres database safely to the schema the application needs, and say what happened."""

__version__ = "0.1.0"
