"""Addresses, in every spelling people use; libpq's own parser and SQLAlchemy's are what they are compared with."""

from __future__ import annotations

import random
from typing import Any
from urllib.parse import quote

import psycopg2.extensions
import pytest
from sqlalchemy import make_url

from migrator.config.database_url import BadAddress, Target, from_environment, parse
from tests.support import PLANTED

PASSWORDS = [
    PLANTED,
    "p@ss",
    "p:ss",
    "p/ss",
    "p@ss/w?rd#1",
    "?x",
    "#",
    "a&b=c",
    "100%",
    "%zz%",
    "%41",
    "a b",
    " lead",
    "it's",
    'quo"te',
    "back\\slash",
    "\\'",
    "+plus+",
    "[v6]",
    "](x",
    "pässwörd",
    "密码",
    "🔑",
    "tab\there",
    "new\nline",
    "@",
    "@@host@",
    ":",
    "::",
    "postgresql://u:p@h/db",
    "h:1/db",
    "${VAR}",
    "a,b",
    "=",
    "12/34",
    "x" * 500,
]


def libpq(address: str) -> dict[str, str]:
    found: dict[str, str] = psycopg2.extensions.parse_dsn(address)
    return found


def sqlalchemy(target: Target, driver: str) -> dict[str, Any]:
    """Return what SQLAlchemy calls the driver's connect() with."""
    url = make_url(target.sqlalchemy_url(driver))
    found: dict[str, Any] = url.get_dialect()().create_connect_args(url)[1]
    return found


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_of_any_characters_survives_every_way(password: str) -> None:
    encoded = quote(password, safe="")
    escaped = password.replace("\\", "\\\\").replace("'", "\\'")
    target = parse(f"postgres://o%40wner:{encoded}@db.example:5433/app%2Fdb?sslmode=require")
    assert target == parse(
        f"host=db.example port=5433 dbname='app/db' user='o@wner' password='{escaped}' sslmode = require"
    )
    assert (target.user, target.password, target.database) == ("o@wner", password, "app/db")
    assert parse(f"postgresql:///db?user=u&password={encoded}").password == password
    for other in (parse(target.sqlalchemy_url()), parse(target.sqlalchemy_url("asyncpg"))):
        assert (other.host, other.port, other.user, other.password, other.database) == (
            "db.example",
            "5433",
            "o@wner",
            password,
            "app/db",
        )
    for driver in ("psycopg2", "psycopg", "asyncpg"):
        arguments = sqlalchemy(target, driver)
        assert arguments["password"] == password
        assert arguments.get("dbname", arguments.get("database")) == "app/db"
    assert target.libpq()["password"] == target.environment()["PGPASSWORD"] == password
    assert target.secrets == (password,)
    assert str(target) == "postgresql://o%40wner@db.example:5433/app%2Fdb"
    assert "password" not in repr(target)


RAW = [password for password in PASSWORDS if password not in {"%41", "postgresql://u:p@h/db"}]


@pytest.mark.parametrize("password", RAW)
@pytest.mark.parametrize("tail", ["h/db", "h:5432/db?sslmode=require", "[::1]:5432/db", "a:1,b:2/db"])
def test_a_raw_password_is_understood(password: str, tail: str) -> None:
    target = parse(f"postgresql+psycopg2://us.er:{password}@{tail}")
    assert (target.user, target.password, target.database) == ("us.er", password, "db")
    assert (target.host, target.port) == {
        "h/db": ("h", ""),
        "h:5432/db?sslmode=require": ("h", "5432"),
        "[::1]:5432/db": ("::1", "5432"),
        "a:1,b:2/db": ("a,b", "1,2"),
    }[tail]


@pytest.mark.parametrize("password", PASSWORDS)
def test_people_see_no_part_of_a_raw_password(password: str) -> None:
    text = f"xx{password}yy"
    target = parse(f"postgresql://u:{text}@h/db")
    assert str(target) == "postgresql://u@h/db"
    assert "xx" not in repr(target)
    assert "yy" not in repr(target)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://u:p@h:5432/db",
        "postgres://u@h/db",
        "postgresql:///db",
        "postgresql://h/db?connect_timeout=3&application_name=my%20app",
        "postgresql://u:p@[2001:db8::1]:6000/db",
        "postgresql://u:p@[::1]/db",
        "postgresql://u:p@h1:1,h2:2,[::1]:3/db?target_session_attrs=read-write",
        "postgresql://u:p@h1,h2/db",
        "postgresql://u:p@h1:1,h2/db",
        "postgresql:///db?host=/var/run/postgresql&port=5433",
        "postgresql://u@%2Fvar%2Frun%2Fpostgresql/db",
        "postgresql://u@%2Fvar%2Frun%2Fpg:6000/db",
        "postgresql://u@/db?host=%2Fsock%2Fa%40b",
        "postgresql://u:@h/db",
        "postgresql://u:p@h/db?sslmode=verify-full&sslrootcert=/ca%20files/root@ca.crt",
        "postgresql://u:p@h/db?user=me@server",
        "postgresql://u:p@h/db?options=-c%20search_path%3Da%2Cb",
        "postgresql://u:p@/db?host=a,b&port=1,2",
        "postgresql://u:p@/db?host=::1",
        "postgresql://u:p%25@h/db",
        "postgresql://%75:%70@h/%64b",
    ],
)
def test_a_url_means_what_it_means_to_libpq(address: str) -> None:
    theirs = {key: value for key, value in libpq(address).items() if value}
    if set(theirs.get("port", "").split(",")) == {""}:
        theirs.pop("port", None)
    assert parse(address).libpq() == theirs


@pytest.mark.parametrize(
    "text",
    [
        "dbname=db",
        "host=h port=5432 dbname=db user=u password=p",
        "  host = h   dbname =db ",
        "dbname='a b' password='it\\'s' user=o\\'b",
        "dbname=db password=",
        "dbname=db password=''",
        "dbname=db password=it's",
        "dbname=db password='a''b'='c'",
        "dbname=db password='open",
        "dbname=db password=\\\\x",
        "dbname=db password=a\\ b",
        "dbname=db password='a\\\\'",
        "dbname=db\tpassword=x\nuser=u",
        "dbname=db host=::1 port=1",
        "dbname=db host=/var/run/pg",
        "dbname=db host=a,b port=1,2",
        "dbname=db host= h",
        "dbname=db host",
        "dbname=db host=h =x",
        "dbname=one dbname=two",
        "dbname=db password = 'x' sslmode=require",
        "dbname=db password='a=b c=d'",
        "dbname=db password=a=b",
    ],
)
def test_key_value_pairs_mean_what_they_mean_to_libpq(text: str) -> None:
    try:
        theirs = {key: value for key, value in libpq(text).items() if value}
    except psycopg2.ProgrammingError:
        with pytest.raises(BadAddress):
            parse(text)
        return
    assert parse(text).libpq() == theirs


def test_key_value_pairs_at_random_mean_what_they_mean_to_libpq() -> None:
    chance = random.Random(20)  # noqa: S311 - no secret
    compared = 0
    for _ in range(20_000):
        value = "".join(chance.choice("ab'\\ =%@\t") for _ in range(chance.randrange(7)))
        text = f"dbname=db password={value}" + chance.choice(["", " user=u", "'"])
        try:
            theirs = {key: found for key, found in libpq(text).items() if found}
        except psycopg2.ProgrammingError as error:
            if "invalid connection option" in str(error):
                continue  # which keys there are is left to libpq, when it connects
            with pytest.raises(BadAddress):
                parse(text)
            continue
        compared += 1
        assert parse(text).libpq() == theirs, text
    assert compared > 5000


def test_urls_at_random_mean_what_they_mean_to_libpq() -> None:
    """Where a URL is one by RFC 3986; what is not (a raw password) libpq misreads or refuses."""
    chance = random.Random(21)  # noqa: S311 - no secret
    for _ in range(5_000):
        password = "".join(chance.choice("ab'\\ =%@:/?#&[]\t+ü") for _ in range(chance.randrange(1, 9)))
        hosts = chance.choice(["h", "h:1", "[::1]:2", "a:1,b:2", "%2Fsock"])
        address = f"postgresql://u:{quote(password, safe='')}@{hosts}/db"
        assert parse(address).libpq() == libpq(address), address


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg", "asyncpg"])
@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("postgresql://u:p@h:6000/db", "h", "6000"),
        ("postgresql://u:p@h/db", "h", ""),
        ("postgresql://u:p@[2001:db8::1]:6000/db", "2001:db8::1", "6000"),
        ("postgresql://u:p@[fe80::1%25eth0]:6000/db", "fe80::1%eth0", "6000"),
        ("postgresql://u:p@/db?host=/var/run/pg&port=6000", "/var/run/pg", "6000"),
        ("postgresql://u:p@h1:1,h2:2/db", "h1,h2", "1,2"),
        ("postgresql://u:p@/db?host=h1:1&host=h2:2", "h1,h2", "1,2"),
        ("postgresql://u:p@/db?host=h1:1&host=[::1]:2", "h1,::1", "1,2"),
        ("postgresql://u:p@/db?host=h1:1&host=h2", "h1,h2", "1,"),
        ("postgresql://u:p@h1,h2/db", "h1,h2", ""),
    ],
)
def test_sqlalchemy_goes_where_libpq_goes(driver: str, address: str, host: str, port: str) -> None:
    target = parse(address)
    assert (target.host, target.port) == (host, port)
    found = sqlalchemy(target, driver)
    hosts, ports = found["host"], found.get("port") or ""
    hosts = hosts if isinstance(hosts, list) else hosts.split(",")
    ports = ports if isinstance(ports, list) else str(ports).split(",")
    assert ",".join(hosts) == host
    # asyncpg wants each port said; libpq takes an empty one for 5432.
    assert [str(each or 5432) for each in ports] == [
        each or "5432" for each in (port.split(",") if port or len(ports) == 1 else [""] * len(hosts))
    ]


def test_drivers() -> None:
    assert parse("postgresql+AsyncPG://u@h/db").sqlalchemy_url() == "postgresql+asyncpg://u@h/db"
    assert parse("postgres+psycopg://u@h/db").sqlalchemy_url("psycopg2") == "postgresql+psycopg://u@h/db"
    assert parse("POSTGRES://u@h/db").sqlalchemy_url("psycopg2") == "postgresql+psycopg2://u@h/db"
    assert parse("host=h dbname=db").sqlalchemy_url() == "postgresql://h/db"


def test_what_only_asyncpg_knows_is_kept_from_libpq_and_the_other_way_round() -> None:
    address = (
        "postgresql+asyncpg://u@h/db?prepared_statement_cache_size=0&ssl=verify-full&command_timeout=5"
        "&target_session_attrs=read-write&application_name=x&sslrootcert=/ca"
    )
    target = parse(address)
    assert target.libpq() == {
        "host": "h",
        "user": "u",
        "dbname": "db",
        "sslmode": "verify-full",
        "target_session_attrs": "read-write",
        "application_name": "x",
        "sslrootcert": "/ca",
    }
    assert sqlalchemy(target, "") == {
        "host": "h",
        "user": "u",
        "database": "db",
        "ssl": "verify-full",
        "prepared_statement_cache_size": 0,
        "command_timeout": "5",
        "target_session_attrs": "read-write",
    }
    assert dict(parse("postgresql://h/db?ssl=true").parameters) == {"sslmode": "require"}
    assert dict(parse("postgresql://h/db?ssl=1&sslmode=prefer").parameters)["sslmode"] == "prefer"


def test_every_parameter_of_libpq_that_has_a_variable_reaches_child_processes() -> None:
    """What secures a connection must not be lost on the way to pg_dump: `require_auth`, a CRL, TLS versions."""
    options = libpq_variables()
    assert len(options) > 20
    address = " ".join(f"{name}=1" for name in options)
    found = parse(address).environment()
    assert found == {variable: "1" for name, variable in options.items()}


def libpq_variables() -> dict[str, str]:
    """Ask the loaded libpq for its parameters and their variables (PQconndefaults)."""
    import ctypes

    class Option(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_char_p) for name in ("keyword", "envvar", "compiled", "val", "label", "dispchar")
        ] + [("dispsize", ctypes.c_int)]

    library = ctypes.CDLL(psycopg2._psycopg.__file__)  # type: ignore[attr-defined]
    library.PQconndefaults.restype = ctypes.POINTER(Option)
    found, options = {}, library.PQconndefaults()
    for option in options:
        if not option.keyword:
            return found
        if option.envvar:
            found[option.keyword.decode()] = option.envvar.decode()
    raise AssertionError("unreachable")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("", "it is empty"),
        ("  \n", "it is empty"),
        ("postgres", "it is not a Postgres address: write postgresql://"),
        ("mysql://u:s3cret@h/db", "its scheme is not postgresql://"),
        ("jdbc:postgresql://h/db?password=s3cret", "its scheme is not postgresql://"),
        ("'postgresql://u:s3cret@h/db'", "its scheme is not postgresql://"),
        ("postgresql:/u:s3cret@h/db", "it is not a Postgres address"),
        ("postgresql://u:s3cret@h", "it names no database"),
        ("postgresql://u:s3cret@h/", "it names no database"),
        ("postgresql://u:s3/cret@h", "it names no database"),
        ("postgresql://u:s3?cret@h", "it names no database"),
        ("postgresql://", "it names no database"),
        ("postgresql://u:s3cret@h:0/db", "its port '0' is not a number from 1 to 65535"),
        ("postgresql://u:s3cret@h:65536/db", "its port '65536' is not a number"),
        ("postgresql://u:s3cret@h:543x/db", "it does not have the form postgresql://user"),
        ("postgresql://u:s3cret@h/db/more", "it does not have the form"),
        ("postgresql://u:s3cret@[::1/db", "it does not have the form"),
        ("postgresql://u:s3cret@h/db#fragment", "it does not have the form"),
        ("host=h dbname=db port=99999", "its port '99999'"),
        ("host=h password=s3cret", "it names no database"),
        ("Host=h;Password=s3cret;Database=db", "key=value pairs"),
        ("host=h;password=s3cret;dbname=db", "it names no database"),
        ("DATABASE_URL=postgresql://u:s3cret@h/db", "key=value pairs"),
    ],
)
def test_what_is_no_address_is_refused_without_repeating_it(address: str, reason: str) -> None:
    with pytest.raises(BadAddress) as caught:
        parse(address)
    assert reason in str(caught.value)
    assert "s3" not in str(caught.value)
    assert "cret" not in str(caught.value)


def test_every_password_is_a_secret() -> None:
    target = parse("postgresql://u:one@h/db?sslpassword=two")
    assert target.secrets == ("one", "two")
    assert "two" not in repr(target) + str(target)
    assert parse("postgresql://u@h/db").secrets == ()


def test_another_database_of_the_same_server() -> None:
    target = parse("postgresql+psycopg://u:p@h:1/db?sslmode=require").with_database("a/b c")
    assert target.sqlalchemy_url() == "postgresql+psycopg://u:p@h:1/?sslmode=require&dbname=a%2Fb%20c"


def test_defaults_give_way_to_the_address_except_where_it_says_nothing() -> None:
    target = parse("postgresql://h/db?connect_timeout=9")
    assert target.libpq(connect_timeout=2, keepalives=1) == {
        "host": "h",
        "dbname": "db",
        "connect_timeout": "9",
        "keepalives": "1",
    }


# -- from the environment -----------------------------------------------------------------------------------


def test_the_variables_of_libpq() -> None:
    target = from_environment(
        {"PGHOST": "/sock", "PGPORT": "5433", "PGUSER": "u", "PGPASSWORD": PLANTED, "PGSSLMODE": "require"}
    )
    assert target == Target("/sock", "5433", "u", "u", PLANTED, "", (("sslmode", "require"),))
    assert from_environment({"PGUSER": "u", "PGPASSWORD": "p"}) is None
    assert from_environment({"PGHOST": "", "PGDATABASE": ""}) is None
    assert from_environment({"PGSERVICE": "prod"}) == Target(parameters=(("service", "prod"),))
    assert from_environment({"PGHOST": "a,b", "PGPORT": "1,2", "PGDATABASE": "d"}) == Target(
        "a,b", "1,2", "d"
    )
    with pytest.raises(BadAddress, match="names no database"):
        from_environment({"PGHOST": "h"})
    with pytest.raises(BadAddress, match="its port 'x'"):
        from_environment({"PGHOST": "h", "PGDATABASE": "d", "PGPORT": "x"})


def test_the_variables_of_the_postgres_image() -> None:
    assert from_environment({"POSTGRES_HOST": "db"}) == Target("db", "", "postgres", "postgres")
    assert from_environment(
        {"POSTGRES_DB": "d", "POSTGRES_USER": "u", "POSTGRES_PASSWORD": PLANTED}
    ) == Target("localhost", "", "d", "u", PLANTED)
    assert from_environment({"POSTGRES_USER": "u", "POSTGRES_PASSWORD": "p"}) is None


def test_a_kubernetes_service_named_postgres_spoils_nothing() -> None:
    """Kubernetes sets POSTGRES_PORT=tcp://10.96.0.7:5432 in every pod beside a Service of that name."""
    environment = {"POSTGRES_HOST": "postgres", "POSTGRES_DB": "d", "POSTGRES_PORT": "tcp://10.96.0.7:5433"}
    target = from_environment(environment)
    assert target is not None
    assert (target.host, target.port) == ("postgres", "5433")
    with pytest.raises(BadAddress, match="its port"):
        from_environment({**environment, "POSTGRES_PORT": "udp://x"})
