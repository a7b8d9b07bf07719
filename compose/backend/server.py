"""A small shop backend: it has no migrations of its own and relies on the schema that migrator leaves.

`/` lists the shops, `/revenue` the last days' revenue, `/invoices` the invoices of compose/two-databases, and
`/healthz` says whether the database answers. The address comes from the file DATABASE_URL_FILE, or from
POSTGRES_HOST, _PORT, _USER, _DB and _PASSWORD_FILE.
"""

import json
import os
import signal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psycopg2

QUERIES = {
    "/": """
        SELECT o.slug, o.name, o.home_currency AS currency,
               (SELECT count(*) FROM catalog.products AS p WHERE p.organization_id = o.id) AS products,
               (SELECT count(*)
                FROM sales.orders AS s
                JOIN integrations.marketplace_accounts AS a ON a.id = s.account_id
                WHERE a.organization_id = o.id) AS orders
        FROM accounts.organizations AS o
        ORDER BY o.slug
    """,
    "/revenue": """
        SELECT r.day::text, o.slug, r.marketplace, r.currency, r.orders, r.revenue::text
        FROM sales.daily_revenue AS r
        JOIN accounts.organizations AS o ON o.id = r.organization_id
        ORDER BY r.day DESC, o.slug, r.marketplace
        LIMIT 20
    """,
    # Of compose/two-databases, where this file is the backend of the second database, too.
    "/invoices": "SELECT number, total::text, paid_on::text FROM invoices ORDER BY number",
    "/healthz": "SELECT true AS healthy",
}


def connect():
    """Open a connection; each request has its own, so that none outlives a restart of the database."""
    url_file = os.environ.get("DATABASE_URL_FILE")
    if url_file:
        return psycopg2.connect(Path(url_file).read_text().strip(), connect_timeout=3)
    return psycopg2.connect(
        host=os.environ["POSTGRES_HOST"],
        port=os.environ.get("POSTGRES_PORT", "5432"),
        user=os.environ["POSTGRES_USER"],
        dbname=os.environ["POSTGRES_DB"],
        password=Path(os.environ["POSTGRES_PASSWORD_FILE"]).read_text().rstrip("\r\n"),
        connect_timeout=3,
    )


def rows(query):
    """Return a query's rows as dictionaries."""
    connection = connect()
    try:
        with connection.cursor() as cursor:
            cursor.execute(query)
            names = [column.name for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]
    finally:
        connection.close()


class Handler(BaseHTTPRequestHandler):
    """Answers GET with the rows of the path's query, as JSON."""

    def do_GET(self):
        query = QUERIES.get(self.path)
        if query is None:
            self.answer(404, {"error": "no such page"})
            return
        try:
            self.answer(200, rows(query))
        except psycopg2.Error as error:
            self.answer(503, {"error": str(error).strip()})

    def answer(self, status, content):
        """Send `content` as JSON."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def stop(*_):
    """End at once: as process 1, Python would otherwise ignore SIGTERM."""
    raise SystemExit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    ThreadingHTTPServer(("", 8000), Handler).serve_forever()
