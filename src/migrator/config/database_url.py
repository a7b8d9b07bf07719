"""The target: one database's address, parsed from every common form and rendered for each reader.

Addresses come from people, compose files and cloud consoles. The parser accepts their forms:
percent-encoded or raw passwords with any character, SQLAlchemy driver suffixes, libpq key-value
strings, several hosts, and Unix sockets. Sources:
https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING and
https://docs.sqlalchemy.org/en/20/core/engines.html#database-urls
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from migrator.config.secret_files import SecretFiles

SCHEME = re.compile(r"^(postgres(?:ql)?)(?:\+([A-Za-z0-9_]+))?://", re.IGNORECASE)

# The host part: names, IPv4, bracketed IPv6, or percent-encoded socket folders, each with a port or without.
_HOST = r"(?:\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[^@/?#:\[\],]*)(?::\d*)?"
_HOSTS = rf"{_HOST}(?:,{_HOST})*"
_TAIL = rf"(?P<hosts>{_HOSTS})(?:/(?P<database>[^/?#]*))?(?:\?(?P<query>.*))?$"
_STRICT = re.compile(r"^(?:(?P<userinfo>[^@/?#]*)@)?" + _TAIL, re.DOTALL)
_RAW_PASSWORD = r"^(?P<userinfo>.*)@" + _TAIL

# Connection parameters that libpq reads from the environment, by their name in a connection string.
# https://www.postgresql.org/docs/current/libpq-envars.html
_PLAIN = """
    host hostaddr port user password passfile service options sslmode sslcert sslkey sslcertmode sslrootcert sslcrl
    sslcrldir sslsni sslnegotiation sslcompression ssl_min_protocol_version ssl_max_protocol_version channel_binding
    require_auth requirepeer gssencmode gssdelegation gsslib krbsrvname target_session_attrs load_balance_hosts
    client_encoding
"""
ENVIRONMENT_NAMES: Mapping[str, str] = {
    "dbname": "PGDATABASE",
    "application_name": "PGAPPNAME",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    **{name: f"PG{name.replace('_', '').upper()}" for name in _PLAIN.split()},
}

# Parameters of asyncpg's connect() and of SQLAlchemy's dialect for it. Those that both libpq and asyncpg
# know go to both. libpq would refuse the whole address for those that only asyncpg knows.
_ASYNCPG_ONLY = frozenset(
    {
        "async_fallback",
        "command_timeout",
        "max_cached_statement_lifetime",
        "prepared_statement_cache_size",
        "prepared_statement_name_func",
        "statement_cache_size",
        "timeout",
    }
)
_ASYNCPG_KEEPS = frozenset(
    {"command_timeout", "host", "port", "prepared_statement_cache_size", "target_session_attrs", "timeout"}
)
_FILES_FOR_ASYNCPG = frozenset(
    {
        *("sslrootcert", "sslcert", "sslkey", "sslcrl", "sslnegotiation"),
        *("ssl_min_protocol_version", "ssl_max_protocol_version"),
    }
)
_QUERY_KEYS = {*ENVIRONMENT_NAMES, *_ASYNCPG_ONLY, "ssl", "sslpassword", "fallback_application_name"}


# Kubernetes sets POSTGRES_PORT to this form in every pod beside a Service named postgres.
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE_LINK = r"^tcp://.*:(\d+)$"


class BadAddress(ValueError):
    """An address that is not one for Postgres. The message never repeats the address, which holds a password."""


class Target(NamedTuple):
    """One database to migrate.

    ``host`` and ``port`` may be comma-separated lists (libpq's multi-host form). ``parameters`` holds
    every other libpq connection parameter. ``driver`` is SQLAlchemy's driver name if the address has
    one. With ``source``, the password comes from a file, and every rendering uses the file's current
    content.
    """

    host: str = ""
    port: str = ""
    database: str = ""
    user: str = ""
    password: str = ""
    driver: str = ""
    parameters: tuple[tuple[str, str], ...] = ()
    source: SecretFiles | None = None

    def __repr__(self) -> str:
        """Render for a traceback: without password and parameters, because one may be sslpassword."""
        return f"Target({self})"

    def __str__(self) -> str:
        """Render for people: without password and parameters, because one may be secret."""
        user = f"{_quoted(self.user)}@" if self.user else ""
        hosts = ",".join(
            f"[{host}]" if ":" in host else (_quoted(host) if host.startswith("/") else host)
            for host in self.host.split(",")
        )
        port = f":{self.port}" if self.port else ""
        return f"postgresql://{user}{hosts}{port}/{_quoted(self.database)}"

    @property
    def secrets(self) -> tuple[str, ...]:
        """Return every string that must never be shown, in each form that a log may contain."""
        found = {self.password} | {value for key, value in self.parameters if key.endswith("password")}
        return tuple(sorted(found - {""}))

    def with_database(self, database: str) -> Target:
        return self._replace(database=database)

    def fresh(self) -> Target:
        """Return the target with the current password of its file, if it has a file."""
        return self if self.source is None else self.source.renewed(self)

    def libpq(self, **overrides: str | int) -> dict[str, str]:
        """Return keyword arguments for ``psycopg2.connect``. ``overrides`` are defaults: the address wins."""
        self = self.fresh()
        arguments = {key: str(value) for key, value in overrides.items()}
        foreign = _ASYNCPG_ONLY if self.driver == "asyncpg" else frozenset()
        arguments.update({key: value for key, value in self.parameters if key not in foreign})
        for key, value in (
            ("host", self.host),
            ("port", self.port),
            ("dbname", self.database),
            ("user", self.user),
            ("password", self.password),
        ):
            if value:
                arguments[key] = value
        return arguments

    def environment(self) -> dict[str, str]:
        """Return libpq's environment variables for child processes. Other users can read arguments."""
        return {
            ENVIRONMENT_NAMES[key]: value for key, value in self.libpq().items() if key in ENVIRONMENT_NAMES
        }

    def tls_variables(self) -> dict[str, str]:
        """Return the certificate files as libpq's variables: asyncpg's connect() has no other way to take
        them.

        SQLAlchemy passes the parameters of the address to that function. Its ``ssl`` is only the mode.
        """
        return {
            ENVIRONMENT_NAMES[key]: value
            for key, value in self.parameters
            if key in _FILES_FOR_ASYNCPG and value
        }

    def sqlalchemy_url(self, driver: str = "") -> str:
        """Return the address for SQLAlchemy, with ``driver`` if the address itself names no driver."""
        self, driver = self.fresh(), self.driver or driver
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        userinfo = _quoted(self.user)
        if self.password:
            userinfo += ":" + _quoted(self.password)
        hosts, ports = self.host.split(","), self.port.split(",")
        parameters = dict(self.parameters)
        if len(hosts) > 1 or self.host.startswith("/"):
            # SQLAlchemy takes several hosts and socket folders as query parameters only.
            netloc = ""
            parameters["host"] = self.host
            if self.port:
                parameters["port"] = self.port
            if driver == "asyncpg" and len(hosts) > 1:  # which wants a port for each
                each = ports * len(hosts) if len(ports) == 1 else ports
                parameters["port"] = ",".join(port or "5432" for port in each)
        else:
            host = f"[{self.host}]" if ":" in self.host else self.host
            netloc = host + (f":{ports[0]}" if ports[0] else "")
        if driver == "asyncpg":
            parameters = _for_asyncpg(parameters)
        path = self.database
        if (
            _quoted(path) != path
        ):  # SQLAlchemy does not decode the path, and libpq does; both decode the query
            parameters["database" if driver == "asyncpg" else "dbname"] = path
            path = ""
        at = "@" if userinfo else ""
        query = ""
        if parameters:
            from urllib.parse import quote, urlencode

            query = "?" + urlencode(parameters, quote_via=quote)
        return f"{scheme}://{userinfo}{at}{netloc}/{path}{query}"


def parse(address: str) -> Target:
    """Read an address in URL or key-value form.

    A password may hold any character, encoded or raw. A percent sign without two hexadecimal digits
    stands for itself. The *last* ``@`` that a host can follow ends the password. Raises
    :class:`BadAddress`.
    """
    text, address = address, address.strip()
    if not address:
        raise BadAddress("it is empty")
    scheme = SCHEME.match(address)
    if scheme is None:
        if "://" in address.partition("=")[0] or address.startswith(("'", '"')):
            raise BadAddress("its scheme is not postgresql://")
        if "=" not in address:
            raise BadAddress(
                "it is not a Postgres address: write postgresql://user@host/database or host=... dbname=..."
            )
        return _parse_dsn(text)  # its last character may be an escaped space
    rest = address[scheme.end() :]
    match = _match(rest)
    if match is None:
        raise BadAddress("it does not have the form postgresql://user:password@host:port/database")
    user, _, password = (match["userinfo"] or "").partition(":")
    pairs = _pairs(match["query"] or "")
    parameters = dict(pairs)
    hosts, ports = _split_hosts(match["hosts"])
    if parameters.pop("host", ""):
        # With several hosts, in SQLAlchemy's form, each host may have its port.
        hosts, query_ports = _query_hosts([value for key, value in pairs if key == "host"])
        ports = query_ports or ports
    if "ssl" in parameters and "sslmode" not in parameters:
        # asyncpg's spelling, and JDBC's ssl=true.
        value = parameters.pop("ssl")
        parameters["sslmode"] = "require" if value.lower() in {"true", "1"} else value
    return _finish(
        Target(
            host=hosts,
            port=parameters.pop("port", "") or ports,
            # As in libpq and SQLAlchemy, the query wins.
            database=parameters.pop("dbname", parameters.pop("database", ""))
            or _unquoted(match["database"] or ""),
            user=parameters.pop("user", "") or _unquoted(user),
            password=parameters.pop("password", "") or _unquoted(password),
            driver=(scheme[2] or "").lower(),
            parameters=tuple(sorted(parameters.items())),
        )
    )


def _quoted(text: str) -> str:
    """Percent-encode a part of an address. Most are plain names and need no import."""
    if not text or (text.isascii() and text.isidentifier()):
        return text
    from urllib.parse import quote

    return quote(text, safe="")


def _unquoted(text: str) -> str:
    """Decode a part of an address like urllib.parse, whose import takes longer than the rest of this work."""
    return re.sub(
        "(?:%[0-9A-Fa-f]{2})+",
        lambda found: bytes.fromhex(found[0].replace("%", "")).decode(errors="replace"),
        text,
    )


def _pairs(query: str) -> list[tuple[str, str]]:
    if not query:
        return []
    from urllib.parse import parse_qsl

    return parse_qsl(query, keep_blank_values=True)


def secrets_in(address: str) -> set[str]:
    """Return an address's passwords, and the address itself if it has any; return any text that is not an
    address.
    """
    try:
        found = parse(address).secrets
    except BadAddress:
        return {address} - {""}
    return {address, *found} if found else set()


def _match(rest: str) -> re.Match[str] | None:
    """Split the part after the scheme by RFC 3986 if possible, else with a raw password in it.

    A password such as ``p@ss/w?rd#1`` makes the strict reading take ``ss`` as the host. Its database or
    query then holds the ``@`` that really ends the password.
    """
    strict = _STRICT.match(rest)
    if strict is not None:
        query = strict["query"] or ""
        keys = {pair.partition("=")[0] for pair in query.split("&")}
        if "@" not in (strict["database"] or "") and ("@" not in query or keys <= _QUERY_KEYS):
            return strict
    return re.match(_RAW_PASSWORD, rest, re.DOTALL)


def _query_hosts(values: list[str]) -> tuple[str, str]:
    """Read the values of ``host=``: names, addresses or socket folders; ``name:port`` is accepted."""
    hosts, ports = [], []
    for part in ",".join(values).split(","):
        match = re.fullmatch(r"(\[.*\]|[^:/]*):(\d+)", part)
        hosts.append((match[1] if match else part).strip("[]"))
        ports.append(match[2] if match else "")
    return ",".join(hosts), ",".join(ports) if any(ports) else ""


def _split_hosts(text: str) -> tuple[str, str]:
    hosts, ports = [], []
    for part in text.split(","):
        match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::(\d*))?", part)
        if match is None:  # pragma: no cover - the address's own pattern admits nothing else
            raise BadAddress("one of its hosts cannot be read")
        hosts.append(_unquoted(match[1].strip("[]")))
        ports.append(match[2] or "")
    return ",".join(hosts), ",".join(ports) if any(ports) else ""


def _parse_dsn(text: str) -> Target:
    """Read libpq's key-value form: ``host=h dbname='a b' password=x\\'y``."""
    pattern = re.compile(
        r"\s*([a-z_]+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|(?!')((?:[^\s\\]|\\.|\\\Z)*))", re.DOTALL
    )
    values: dict[str, str] = {}
    position = 0
    while position < len(text.rstrip()):
        match = pattern.match(text, position)
        if match is None or match.end() == position:
            raise BadAddress("its key=value pairs cannot be read")
        raw = match[2] if match[2] is not None else match[3]
        values[match[1]] = re.sub(r"\\(.|\Z)", r"\1", raw, flags=re.DOTALL)
        position = match.end()
    return _finish(
        Target(
            host=values.pop("host", ""),
            port=values.pop("port", ""),
            database=values.pop("dbname", ""),
            user=values.pop("user", ""),
            password=values.pop("password", ""),
            parameters=tuple(sorted(values.items())),
        )
    )


def _finish(target: Target) -> Target:
    for port in target.port.split(","):
        if port and not (port.isdecimal() and 0 < int(port) < 65536):
            raise BadAddress(f"its port {port!r} is not a number from 1 to 65535")
    if not target.database and "service" not in dict(target.parameters):
        raise BadAddress("it names no database")
    return target


def _for_asyncpg(parameters: Mapping[str, str]) -> dict[str, str]:
    kept = {key: value for key, value in parameters.items() if key in _ASYNCPG_KEEPS}
    if "sslmode" in parameters:
        kept["ssl"] = parameters["sslmode"]
    return kept


def from_environment(environment: Mapping[str, str]) -> Target | None:
    """Build the target from libpq's ``PG*``, else ``POSTGRES_HOST/PORT/USER/PASSWORD/DB``; None if neither is
    set.

    Passwords are plain values here: the caller has resolved ``NAME_FILE``.
    """
    if environment.get("PGHOST") or environment.get("PGDATABASE") or environment.get("PGSERVICE"):
        by_variable = {variable: key for key, variable in ENVIRONMENT_NAMES.items()}
        # libpq reads the rest of its variables itself.
        parameters = {
            by_variable[name]: value
            for name, value in environment.items()
            if name in by_variable
            and value
            and name not in {"PGHOST", "PGPORT", "PGDATABASE", "PGUSER", "PGPASSWORD", "PGAPPNAME"}
        }
        user = environment.get("PGUSER", "")
        return _finish(
            Target(
                host=environment.get("PGHOST", ""),
                port=environment.get("PGPORT", ""),
                database=environment.get("PGDATABASE", "") or user,
                user=user,
                password=environment.get("PGPASSWORD", ""),
                parameters=tuple(sorted(parameters.items())),
            )
        )
    if environment.get("POSTGRES_HOST") or environment.get("POSTGRES_DB"):
        user = environment.get("POSTGRES_USER", "") or "postgres"
        return _finish(
            Target(
                host=environment.get("POSTGRES_HOST", "") or "localhost",
                port=re.sub(_SERVICE_LINK, r"\1", environment.get("POSTGRES_PORT", "")),
                database=environment.get("POSTGRES_DB", "") or user,
                user=user,
                password=environment.get("POSTGRES_PASSWORD", ""),
            )
        )
    return None
