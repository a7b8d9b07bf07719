"""What goes wrong with a connection or a query, and whether waiting can help."""

from __future__ import annotations

import enum
import re


class Refusal(enum.Enum):
    """Why a connection failed, as far as it matters for what to do about it."""

    TRANSIENT = "not ready"
    DENIED = "denied"
    NO_DATABASE = "no such database"


class ConnectFailed(Exception):
    """A connection could not be made; ``refusal`` says whether waiting can help, ``sqlstate`` may be empty."""

    def __init__(self, refusal: Refusal, text: str, sqlstate: str = "") -> None:
        super().__init__(text)
        self.refusal = refusal
        self.text = text
        self.sqlstate = sqlstate

    @property
    def silent(self) -> bool:
        """Whether nobody said anything: no server, and no host that refuses either."""
        return not self.sqlstate and ("no answer within" in self.text or "timeout expired" in self.text)


class QueryFailed(Exception):
    """A statement failed; ``sqlstate`` is empty where the connection itself was lost (``lost``)."""

    def __init__(self, text: str, sqlstate: str = "", *, lost: bool = False) -> None:
        super().__init__(text)
        self.text = text
        self.sqlstate = sqlstate
        self.lost = lost


# What libpq itself says, always in English here, when it is TLS, a credential or a parameter that is wrong:
# fe-connect.c, fe-auth.c and fe-secure-openssl.c of PostgreSQL 13 to 18.
_CLIENT_SIDE_DENIALS = (
    "certificate",
    "does not support SSL",
    "no password supplied",
    "authentication method",
    "authentication failed",
    "channel binding",
    "private key file",
    "invalid sslmode value",
    "invalid connection option",
    "invalid port number",
    "invalid integer value",
    "invalid channel_binding value",
    "definition of service",
    "service file",
    "could not open certificate",
    "tlsv1 alert",
    "SSL error: ",
    "invalid URI",
    "sslnegotiation",
    "does not support GSSAPI",
)
_INVALID_VALUE = r"invalid \S+ value: |could not match \d+ "
_DENIED_CLASSES = ("28",)
_DENIED_CODES = frozenset(
    {
        "42501",  # insufficient_privilege
        "55000",  # object_not_in_prerequisite_state: ALTER DATABASE ... ALLOW_CONNECTIONS false
        "0A000",  # feature_not_supported: a protocol or startup option that this server has not
        "42704",  # undefined_object: options=-c no_such_setting=1
        "22023",  # invalid_parameter_value
        "42601",  # syntax_error: options=--no-such-option
    }
)


def classify(sqlstate: str, text: str) -> Refusal:
    """Decide from SQLSTATE, or from libpq's own English text where there is none, whether waiting can help."""
    if sqlstate == "3D000":  # invalid_catalog_name
        return Refusal.NO_DATABASE
    if sqlstate:
        denied = sqlstate.startswith(_DENIED_CLASSES) or sqlstate in _DENIED_CODES
        return Refusal.DENIED if denied else Refusal.TRANSIENT
    if any(phrase in text for phrase in _CLIENT_SIDE_DENIALS) or re.search(_INVALID_VALUE, text):
        return Refusal.DENIED
    return Refusal.TRANSIENT
