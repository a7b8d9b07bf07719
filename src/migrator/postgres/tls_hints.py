"""Explain a TLS failure, and how to fix it.

For a rejected certificate libpq says only "certificate verify failed", whether it has expired or has an
unknown issuer. Python's ``ssl`` tells the reason; it is imported only after such a failure.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

from migrator.config.database_url import Target

_PATIENCE = 5.0  # seconds for the server to show its certificate
UNEXPLAINED = "certificate verify failed"
# https://www.postgresql.org/docs/current/protocol-message-formats.html#PROTOCOL-MESSAGE-FORMATS-SSLREQUEST
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)

_STEPS = """
certificate has expired: renew the server's certificate, and reload the server
not yet valid: check the clocks of both machines, and the start date of the server's certificate
does not match host name: connect by a name in the server's certificate, or issue a certificate for this name
get server's host name: connect by a name in the server's certificate
unable to get local issuer: set sslrootcert to the file of the CA that signed the server's certificate
self-signed: set sslrootcert to the file of the CA that signed the server's certificate
root certificate: set sslrootcert to a file with the CA's certificate (PEM) that migrator may read
alert certificate revoked: issue a new client certificate (sslcert): the server reports this one as revoked
certificate revoked: renew the server's certificate: the list in sslcrl revokes it
private key: set sslkey to the key of the certificate in sslcert, in a file of mode 0600 (owned by root: 0640)
certificate file: set sslcert to a file with the client's certificate (PEM) that migrator may read
valid client certificate: set sslcert and sslkey to existing files: the server asks for a certificate
certificate authentication failed: use a certificate with the role as common name, or add a map to pg_ident.conf
alert: issue a valid client certificate (sslcert) from a CA in the server's ssl_ca_file
no encryption: set sslmode=verify-full if the server's pg_hba.conf has only hostssl lines; else add a line to it
does not support SSL: enable TLS on the server (ssl = on), or set sslmode=prefer if TLS is not needed
certificate verify failed: check sslrootcert and the server's certificate: its issuer, its name and its dates
"""
"""A text of libpq or the server, and the fix; the first that matches counts."""


def next_step(text: str) -> str:
    """Return the fix for a refusal that is about TLS; else nothing."""
    steps = (line.partition(": ") for line in _STEPS.strip().split("\n"))
    return next((step for words, _, step in steps if words in text), "")


def explain(target: Target, text: str) -> str:
    """Return ``text`` with the reason why the server's certificate was rejected, if that can be found out."""
    if UNEXPLAINED not in text:
        return text
    hosts, ports = target.host.split(","), target.port.split(",")
    for number, host in enumerate(hosts):
        port = ports[number if len(ports) == len(hosts) else 0]
        if host and not host.startswith("/"):
            reason = _reason(target, (host, int(port or 5432)))
            if reason:
                return text.replace(UNEXPLAINED, f"{UNEXPLAINED}: {reason}", 1)
    return text


def _reason(target: Target, address: tuple[str, int]) -> str:
    """Get the server's certificate and return why it is rejected; nothing if that shows nothing."""
    import ssl

    def setting(name: str) -> str:
        return dict(target.parameters).get(name, "") or os.environ.get(f"PG{name.upper()}", "")

    root = setting("sslrootcert") or str(Path.home() / ".postgresql" / "root.crt")
    try:
        context = ssl.create_default_context(cafile=None if root == "system" else root)
        context.check_hostname = False  # libpq itself reports a wrong name
        if setting("sslcrl"):
            context.load_verify_locations(setting("sslcrl"))
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        with socket.create_connection(address, _PATIENCE) as plain:
            plain.sendall(_SSL_REQUEST)
            if plain.recv(1) != b"S":
                return ""
            with context.wrap_socket(plain, server_hostname=address[0]):
                return ""
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    except (OSError, ValueError):
        return ""
