"""Postgres through psycopg2: sessions, errors, deadlines and the version table."""
