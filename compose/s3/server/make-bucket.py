"""Make the bucket at the address that is the only argument, as soon as the server is there; at most for a minute."""

import sys
import time
import urllib.error
import urllib.request


def make(address):
    """Send one PUT. moto asks for no signature, and a bucket that is there already is answered with 200, too."""
    request = urllib.request.Request(address, method="PUT")  # noqa: S310 - the address is in docker-compose.yml
    with urllib.request.urlopen(request, timeout=5):  # noqa: S310 - as above
        print(f"{address} is there")


if __name__ == "__main__":
    deadline = time.monotonic() + 60
    while True:
        try:
            make(sys.argv[1])
            break
        except urllib.error.HTTPError as error:
            sys.exit(f"{sys.argv[1]}: {error}")
        except OSError as error:  # it does not listen yet
            if time.monotonic() > deadline:
                sys.exit(f"{sys.argv[1]}: {error}")
            time.sleep(0.5)
