"""The demo shop, which sales shows to prospects and every environment has.

Revision ID: b05e7c49a1d3
Revises: 3fa2d86e1b94
Create Date: 2024-04-02 16:25:33
"""

from collections.abc import Sequence

from alembic import op

revision: str = "b05e7c49a1d3"
down_revision: str | Sequence[str] | None = "3fa2d86e1b94"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

DEMO = "SELECT id FROM accounts.organizations WHERE slug IN ('demo-shop', 'demo-shop-uk')"
DEMO_ACCOUNTS = f"SELECT id FROM integrations.marketplace_accounts WHERE organization_id IN ({DEMO})"


def upgrade() -> None:
    # Derived from generate_series, never from random(): two environments have to show the same demo.
    op.execute(
        """
        INSERT INTO accounts.organizations (slug, name, home_currency)
        VALUES ('demo-shop', 'Demo Shop', 'EUR'), ('demo-shop-uk', 'Demo Shop UK', 'GBP')
        """
    )
    op.execute(
        f"""
        INSERT INTO accounts.users (organization_id, email, nickname)
        SELECT o.id, role || '@' || o.slug || '.example', nullif(role, 'support')
        FROM accounts.organizations AS o
        CROSS JOIN unnest(ARRAY['owner', 'packer', 'support']) AS role
        WHERE o.id IN ({DEMO})
        ORDER BY o.id, role
        """
    )
    op.execute(
        f"""
        INSERT INTO catalog.products (organization_id, category_id, sku, title, price)
        SELECT o.id, c.id, 'DEMO-' || lpad(n::text, 3, '0'), c.name || ' article ' || n, 4.95 + n
        FROM accounts.organizations AS o
        CROSS JOIN generate_series(1, 24) AS n
        JOIN (
            SELECT id, name, row_number() OVER (ORDER BY slug) AS place
            FROM catalog.categories
            WHERE parent_id IS NOT NULL
        ) AS c ON c.place = 1 + mod(n, 4)
        WHERE o.id IN ({DEMO})
        ORDER BY o.id, n
        """
    )
    op.execute(
        """
        INSERT INTO integrations.marketplace_accounts (organization_id, display_name, country)
        SELECT o.id, account.display_name, account.country
        FROM (VALUES
            ('demo-shop', 'Demo on Amazon', 'DE'),
            ('demo-shop', 'Demo on eBay', 'DE'),
            ('demo-shop-uk', 'Demo on Amazon', 'GB')
        ) AS account (slug, display_name, country)
        JOIN accounts.organizations AS o USING (slug)
        ORDER BY o.id, account.display_name
        """
    )
    op.execute(
        f"""
        INSERT INTO sales.amazon_orders (account_id, amazon_order_id, status, buyer_email, total, currency,
                                         purchase_date, fulfillment_channel, is_prime)
        SELECT a.id, concat_ws('-', 404, 1000000 + a.id, 5000000 + n),
               (ARRAY['pending', 'paid', 'shipped', 'delivered', 'refunded', 'cancelled'])
                   [1 + mod(n, 6)]::sales.order_status,
               'buyer' || n || '@marketplace.example', 0, o.home_currency,
               timestamptz '2024-01-01 08:00+00' + n * interval '13 hours',
               CASE WHEN mod(n, 3) = 0 THEN 'AFN' ELSE 'MFN' END, nullif(mod(n, 3), 2) = 0
        FROM integrations.marketplace_accounts AS a
        JOIN accounts.organizations AS o ON o.id = a.organization_id
        CROSS JOIN generate_series(1, 60) AS n
        WHERE a.id IN ({DEMO_ACCOUNTS}) AND a.display_name = 'Demo on Amazon'
        ORDER BY a.id, n
        """
    )
    op.execute(
        f"""
        INSERT INTO sales.ebay_orders (account_id, ebay_order_id, status, buyer_username, total, currency,
                                       creation_date, sales_record_number)
        SELECT a.id, concat_ws('-', 12, 10000 + n, 70000 + a.id),
               (ARRAY['paid', 'shipped', 'delivered', 'delivered'])[1 + mod(n, 4)]::sales.order_status,
               CASE WHEN mod(n, 10) <> 0 THEN 'collector_' || n END, 0, o.home_currency,
               timestamptz '2024-01-03 19:30+00' + n * interval '29 hours', 900 + n
        FROM integrations.marketplace_accounts AS a
        JOIN accounts.organizations AS o ON o.id = a.organization_id
        CROSS JOIN generate_series(1, 40) AS n
        WHERE a.id IN ({DEMO_ACCOUNTS}) AND a.display_name = 'Demo on eBay'
        ORDER BY a.id, n
        """
    )
    for platform, item_column in (("amazon", "asin"), ("ebay", "item_id")):
        op.execute(
            f"""
            INSERT INTO sales.{platform}_order_lines (order_id, {item_column}, product_id, quantity,
                                                      unit_price)
            SELECT o.id, upper(substr(md5(p.sku), 1, 10)), p.id, 1 + mod(o.id + n, 3), p.price
            FROM sales.{platform}_orders AS o
            JOIN integrations.marketplace_accounts AS a ON a.id = o.account_id
            CROSS JOIN generate_series(1, 2) AS n
            JOIN catalog.products AS p
              ON p.organization_id = a.organization_id
             AND p.sku = 'DEMO-' || lpad((1 + mod(o.id * n, 24))::text, 3, '0')
            WHERE a.id IN ({DEMO_ACCOUNTS}) AND (n = 1 OR mod(o.id, 2) = 0)
            ORDER BY o.id, n
            """
        )
        op.execute(
            f"""
            UPDATE sales.{platform}_orders AS o
            SET total = lines.total
            FROM (
                SELECT order_id, sum(quantity * unit_price) AS total
                FROM sales.{platform}_order_lines
                GROUP BY order_id
            ) AS lines
            WHERE lines.order_id = o.id AND o.account_id IN ({DEMO_ACCOUNTS})
            """
        )


def downgrade() -> None:
    # Orders do not go with their account by themselves, on purpose; everything else of a shop does.
    op.execute(f"DELETE FROM sales.amazon_orders WHERE account_id IN ({DEMO_ACCOUNTS})")
    op.execute(f"DELETE FROM sales.ebay_orders WHERE account_id IN ({DEMO_ACCOUNTS})")
    op.execute(f"DELETE FROM accounts.organizations WHERE id IN ({DEMO})")
