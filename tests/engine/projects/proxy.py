"""A mesh's proxy, as far as order goes: what is sent to port 15001 goes to argv[1]:5432."""

import socket
import sys
import threading


def pump(source, target):
    """Pass on what comes, until nothing more does."""
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        source.close()
        target.close()


def serve(client):
    """Connect on, and pass on in both directions."""
    server = socket.create_connection((sys.argv[1], 5432))
    threading.Thread(target=pump, args=(server, client), daemon=True).start()
    pump(client, server)


with socket.create_server(("127.0.0.1", 15001)) as listener:
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
