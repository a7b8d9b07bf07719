"""What is the matter with TLS, and what to do about it.

libpq says of a certificate that it did not accept only "certificate verify failed", whether it has expired or is
signed by a stranger.  Python's ``ssl`` says which; it is imported when that has happened, and never otherwise.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from migrator.config.database_url import Target

UNEXPLAINED = "certificate verify failed"
# https://www.postgresql.org/docs/current/protocol-message-formats.html#PROTOCOL-MESSAGE-FORMATS-SSLREQUEST
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)

_OUR_CA = "let sslrootcert name the file of the CA that signed the server's certificate"
_STEPS: tuple[tuple[str, str], ...] = (
    ("certificate has expired", "renew the server's certificate, and have the server load it"),
    (
        "not yet valid",
        "check the clocks of both machines, and from when on the server's certificate is valid",
    ),
    (
        "does not match host name",
        "connect by a name that the server's certificate has, or have one issued for this",
    ),
    ("get server's host name", "connect by a name that the server's certificate has"),
    ("unable to get local issuer", _OUR_CA),
    ("self-signed", _OUR_CA),
    (
        "root certificate",
        "let sslrootcert name a file with the CA's certificate (PEM) that migrator may read",
    ),
    (
        "alert certificate revoked",
        "have a new client's certificate (sslcert) issued: this one is revoked, the server says",
    ),
    (
        "certificate revoked",
        "renew the server's certificate: the list in sslcrl says that this one is revoked",
    ),
    (
        "private key",
        "let sslkey name the key of the certificate in sslcert, in a file of mode 0600 (root's own: 0640)",
    ),
    (
        "certificate file",
        "let sslcert name a file with the client's certificate (PEM) that migrator may read",
    ),
    (
        "valid client certificate",
        "give sslcert and sslkey, files that are there: the server asks for a certificate",
    ),
    (
        "certificate authentication failed",
        "use a certificate whose common name is the role, or a map in pg_ident.conf",
    ),
    (
        "alert",
        "have the client's certificate (sslcert) issued by a CA of the server's ssl_ca_file, and valid now",
    ),
    (
        "no encryption",
        "set sslmode=verify-full where the server's pg_hba.conf has only hostssl; else add a line to it",
    ),
    (
        "does not support SSL",
        "switch TLS on at the server (ssl = on), or set sslmode=prefer where none is needed",
    ),
    (
        UNEXPLAINED,
        "check sslrootcert and the server's certificate: who signed it, for which name, until when",
    ),
)


def next_step(text: str) -> str:
    """Return what to do about a refusal that has to do with TLS; nothing where it has not."""
    return next((step for words, step in _STEPS if words in text), "")


def explain(
    target: Target, text: str, seconds: float = 5.0, variables: Mapping[str, str] = os.environ
) -> str:
    """Return ``text`` with the reason why the server's certificate was not accepted, where that can be found out."""
    if UNEXPLAINED not in text:
        return text
    hosts, ports = target.host.split(","), target.port.split(",")
    for number, host in enumerate(hosts):
        port = ports[number if len(ports) == len(hosts) else 0]
        if host and not host.startswith("/"):
            reason = _reason(target, (host, int(port or 5432)), seconds, variables)
            if reason:
                return text.replace(UNEXPLAINED, f"{UNEXPLAINED}: {reason}", 1)
    return text


def _reason(target: Target, address: tuple[str, int], seconds: float, variables: Mapping[str, str]) -> str:
    """Ask the server for its certificate and return why it is not accepted; nothing where that shows nothing."""
    import ssl

    def setting(name: str) -> str:
        return dict(target.parameters).get(name, "") or variables.get(f"PG{name.upper()}", "")

    root = setting("sslrootcert") or str(Path.home() / ".postgresql" / "root.crt")
    try:
        context = ssl.create_default_context(cafile=None if root == "system" else root)
        context.check_hostname = False  # libpq itself says so where it is the name
        if setting("sslcrl"):
            context.load_verify_locations(setting("sslcrl"))
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        with socket.create_connection(address, seconds) as plain:
            plain.sendall(_SSL_REQUEST)
            if plain.recv(1) != b"S":
                return ""
            with context.wrap_socket(plain, server_hostname=address[0]):
                return ""
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    except (OSError, ValueError):
        return ""
