"""Postgres through psycopg2: sessions, errors and the version table."""
