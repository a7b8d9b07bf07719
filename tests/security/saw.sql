-- Say in the server's log that an ordinary role's function was called, and try to gain by that.
CREATE FUNCTION @schema@.saw(what text) RETURNS boolean LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  login text := session_user;
  role text := current_setting('role');
  said text := concat('canary.said_', md5(concat(what, current_user)));
BEGIN
  -- Once a statement is enough: a join of two catalogs calls thousands of times.
  IF current_setting(said, true) = statement_timestamp()::text THEN RETURN true; END IF;
  PERFORM set_config(said, statement_timestamp()::text, false);
  RAISE LOG 'CANARY % called by % as % in "%"', what, session_user, current_user,
    current_setting('application_name');
  BEGIN  -- a session that only became an ordinary role can become again what it logged in as
    EXECUTE 'RESET SESSION AUTHORIZATION';
    EXECUTE 'RESET ROLE';
    IF current_setting('is_superuser') = 'on' THEN EXECUTE 'ALTER ROLE @owner@ SUPERUSER'; END IF;
    PERFORM set_config('session_authorization', login, false), set_config('role', role, false);
  EXCEPTION WHEN OTHERS THEN NULL; END;
  RETURN true;
END $$;
GRANT USAGE ON SCHEMA @schema@ TO PUBLIC;
