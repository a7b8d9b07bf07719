-- All kinds of things that a dump has to carry: types, sequences, large objects, generated and identity columns,
-- partitions, inheritance, an enum, a domain, a materialised view, quoted names, comments.
CREATE SCHEMA "Odd ""schema""";
CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
CREATE DOMAIN percentage AS numeric CHECK (VALUE BETWEEN 0 AND 100);
CREATE TABLE everything (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    small smallint, number integer, big bigint, exact numeric(30, 10), rough real, rougher double precision,
    yes boolean, day date, moment timestamp, instant timestamptz, clock time, span interval, txt text,
    padded char(10), bytes bytea, document json, binary_document jsonb, tags text[], grid integer[][],
    who uuid, host inet, net cidr, mac macaddr, spot point, shape polygon, few bit(4), many varbit,
    feeling mood, share percentage, during tstzrange, words tsvector, price money, page xml,
    doubled integer GENERATED ALWAYS AS (number * 2) STORED
);
INSERT INTO everything (small, number, big, exact, rough, rougher, yes, day, moment, instant, clock, span, txt,
    padded, bytes, document, binary_document, tags, grid, who, host, net, mac, spot, shape, few, many, feeling,
    share, during, words, price)
SELECT g, g * 7, g::bigint << 33, g / 3.0, g / 3.0, 'NaN', g % 2 = 0, date '2000-02-29' + g,
    'infinity', timestamptz '1999-12-31 23:59:59.999999+05' + g * interval '1 hour', '23:59:59.5', '1 mon -2 days',
    E'tab\t newline\n backslash\\ quote'' \U0001F600 ' || g, 'x', decode(md5(g::text), 'hex'),
    '{"a": 1,  "a": 2}', '{"a": [1, null, "ü"]}', ARRAY['a', NULL, 'b,c', '{"}'], '{{1,2},{3,4}}',
    md5(g::text)::uuid, '10.0.0.1/8', '10.0.0.0/8', '08:00:2b:01:02:03', '(1,2)', '((0,0),(1,1),(1,0))',
    B'1010', B'101', 'happy', 12.5, '[2020-01-01,)', 'a fat cat', 12.34
FROM generate_series(1, 500) g;
INSERT INTO everything DEFAULT VALUES;
CREATE TABLE "Odd ""schema"""."T a,b" ("select" integer PRIMARY KEY, "Ü" text UNIQUE);
INSERT INTO "Odd ""schema"""."T a,b" VALUES (1, NULL), (2, '');
CREATE TABLE measured (at date NOT NULL, value integer) PARTITION BY RANGE (at);
CREATE TABLE measured_2020 PARTITION OF measured FOR VALUES FROM ('2020-01-01') TO ('2021-01-01');
CREATE TABLE measured_rest PARTITION OF measured DEFAULT;
INSERT INTO measured SELECT date '2020-06-01' + g, g FROM generate_series(1, 400) g;
CREATE TABLE parent (a integer); CREATE TABLE child (b integer) INHERITS (parent);
INSERT INTO parent VALUES (1); INSERT INTO child VALUES (2, 3), (4, 5);
CREATE UNLOGGED TABLE fleeting AS SELECT 1 AS a;
CREATE SEQUENCE counter START 7 INCREMENT 3; SELECT nextval('counter'), nextval('counter');
CREATE MATERIALIZED VIEW totals AS SELECT count(*) AS n FROM everything;
CREATE VIEW glance AS SELECT id, feeling FROM everything;
CREATE INDEX ON everything USING gin (words);
COMMENT ON TABLE everything IS 'it''s all here';
SELECT lo_from_bytea(4711, decode(repeat('00ff', 3000), 'hex'));
COMMENT ON LARGE OBJECT 4711 IS 'large';
