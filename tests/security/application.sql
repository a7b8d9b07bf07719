-- What an application that owns its schema can have in it: every kind of object that calls a function of its own.
-- The role `app` runs it. The schema `app` and the function app.saw are there.
CREATE TYPE app.colour AS ENUM ('red', 'green');
CREATE TYPE app.pair AS (a integer, b integer);
CREATE DOMAIN app.positive AS integer CHECK (value > 0 AND app.saw('check of a domain'));
CREATE FUNCTION app.as_text(given app.colour) RETURNS text LANGUAGE plpgsql IMMUTABLE AS
  $$ BEGIN PERFORM app.saw('cast'); RETURN pg_catalog.enum_out(given)::pg_catalog.text; END $$;
CREATE CAST (app.colour AS text) WITH FUNCTION app.as_text(app.colour) AS IMPLICIT;
CREATE FUNCTION app.seen(what text, given integer) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS
  $$ BEGIN PERFORM app.saw(what); RETURN given; END $$;

CREATE TABLE app.plain (id integer PRIMARY KEY, note text DEFAULT 'a note');
CREATE TABLE app.typed (id integer, tint app.colour, two app.pair, many app.positive);
CREATE TABLE app.checked (id integer CHECK (app.saw('check constraint')));
CREATE TABLE app.generated (id integer, double integer GENERATED ALWAYS AS (app.seen('generated column', id)) STORED);
CREATE TABLE app.defaulted (id integer DEFAULT app.seen('default', 1), other integer);
CREATE TABLE app.indexed (id integer);
CREATE TABLE app.triggered (id integer);
CREATE TABLE app.ruled (id integer);
CREATE TABLE app.watched (id integer);
CREATE TABLE app.parted (id integer) PARTITION BY LIST (app.seen('partition key', id));
CREATE TABLE app.parted_1 PARTITION OF app.parted FOR VALUES IN (1, 2, 3);

INSERT INTO app.plain SELECT g FROM generate_series(1, 5) g;
INSERT INTO app.typed VALUES (1, 'red', ROW(1, 2), 1), (2, 'green', ROW(3, 4), 2);
INSERT INTO app.checked VALUES (1), (2);
INSERT INTO app.generated VALUES (1), (2);
INSERT INTO app.defaulted (other) VALUES (1), (2);
INSERT INTO app.indexed VALUES (1), (2);
INSERT INTO app.triggered VALUES (1), (2);
INSERT INTO app.ruled VALUES (1), (2);
INSERT INTO app.watched VALUES (1), (2);
INSERT INTO app.parted VALUES (1), (2);

CREATE INDEX ON app.indexed (app.seen('expression index', id));
CREATE INDEX ON app.indexed (id) WHERE app.seen('index predicate', id) > 0;
CREATE STATISTICS app.counted ON (app.seen('extended statistics', id)), id FROM app.indexed;
CREATE VIEW app.shown AS SELECT app.seen('view', id) AS id FROM app.plain;
CREATE MATERIALIZED VIEW app.kept AS SELECT app.seen('materialised view', id) AS id FROM app.plain;
CREATE FUNCTION app.fired() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN PERFORM app.saw('trigger ' || TG_NAME || ' ' || TG_OP); RETURN COALESCE(NEW, OLD); END $$;
CREATE TRIGGER each_row BEFORE INSERT OR UPDATE OR DELETE ON app.triggered
  FOR EACH ROW EXECUTE FUNCTION app.fired();
CREATE TRIGGER each_statement AFTER TRUNCATE ON app.triggered EXECUTE FUNCTION app.fired();
ALTER TABLE app.triggered ENABLE ALWAYS TRIGGER each_row;
CREATE RULE also AS ON INSERT TO app.ruled DO ALSO SELECT app.seen('rule', 1);
ALTER TABLE app.watched ENABLE ROW LEVEL SECURITY;
CREATE POLICY looks ON app.watched USING (app.saw('row security policy'));
