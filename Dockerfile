# The migrator image. Build it with BuildKit:
#
#     docker build -t migrator .
#
# Behind a proxy that re-signs TLS, hand its roots to the build; they reach no layer:
#
#     docker build -t migrator --secret id=ca_certificates,src=/etc/ssl/certs/ca-certificates.crt .

ARG BASE_IMAGE=debian:trixie-slim

# What runs: Python 3.13 and PostgreSQL 17's client, both Debian's own, so that Debian's security updates reach them.
FROM ${BASE_IMAGE} AS runtime

# psql's wrapper is the only thing here that is written in Perl, and PATH below goes round it: Perl's packages are
# installed (apt stays consistent for images built on this one), their files are not (50 MB). An image that needs
# them runs: apt-get install --reinstall perl-modules-5.40 libperl5.40 perl
RUN set -eu; \
    printf 'path-exclude=%s\n' '/usr/share/perl/*' '/usr/lib/*/perl/*' '/usr/lib/*/libperl.so*' \
        > /etc/dpkg/dpkg.cfg.d/migrator; \
    apt-get update -q; \
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
        ca-certificates postgresql-client-17 python3; \
    apt-get clean; \
    rm -rf /etc/dpkg/dpkg.cfg.d/migrator /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/*; \
    useradd --uid 10001 --no-create-home --home-dir /app --shell /usr/sbin/nologin migrator; \
    install -d -m 0755 /app; \
    install -d -m 1777 /backups

# What builds: pip and setuptools stay in this stage. The virtual environment never holds them.
FROM runtime AS build

RUN set -eu; \
    apt-get update -q; \
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
        binutils python3-pip python3-setuptools python3-wheel; \
    python3 -m venv --without-pip /opt/migrator

# Dependencies before source: this layer is rebuilt only when the lock changes. Wheels carry debugging symbols (17 MB);
# the libraries that auditwheel has moved to *.libs are left as they are, for strip breaks some of those.
COPY requirements.lock /build/
RUN --mount=type=secret,id=ca_certificates \
    set -eu; \
    if [ -f /run/secrets/ca_certificates ]; then export PIP_CERT=/run/secrets/ca_certificates; fi; \
    pip --python /opt/migrator/bin/python install --no-cache-dir --require-hashes --no-deps --only-binary :all: \
        --compile -r /build/requirements.lock; \
    find /opt/migrator -name '*.so' -not -path '*.libs/*' -exec strip --strip-unneeded {} +

COPY pyproject.toml README.md LICENSE /build/
COPY src /build/src
COPY entrypoint.py /opt/migrator/
RUN set -eu; \
    python3 -m compileall -q /opt/migrator/entrypoint.py; \
    pip wheel --no-cache-dir --no-index --no-deps --no-build-isolation --wheel-dir /build/dist /build; \
    pip --python /opt/migrator/bin/python install --no-cache-dir --no-index --no-deps --compile /build/dist/*.whl

FROM runtime

COPY --from=build /opt/migrator /opt/migrator

# HOME: a user id that is not in /etc/passwd has none, and programs look for it.
# SSL_CERT_FILE: for sslrootcert=system; psycopg2's own OpenSSL looks where its wheel was built.
# PYTHONPATH: what an env.py imports beyond migrator's own dependencies goes to /app/.deps.
ENV PATH=/opt/migrator/bin:/usr/lib/postgresql/17/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/app/.deps \
    PYTHONUNBUFFERED=1 \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt

WORKDIR /app
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/migrator/bin/python", "/opt/migrator/entrypoint.py"]

# Last, for they change with each build.
ARG MIGRATOR_VERSION=dev
ARG MIGRATOR_REVISION=unknown
ARG MIGRATOR_CREATED=unknown
ENV MIGRATOR_IMAGE_VERSION=${MIGRATOR_VERSION}
LABEL org.opencontainers.image.title="migrator" \
      org.opencontainers.image.description="Waits for Postgres, backs it up, runs Alembic's migrations, verifies" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${MIGRATOR_VERSION}" \
      org.opencontainers.image.revision="${MIGRATOR_REVISION}" \
      org.opencontainers.image.created="${MIGRATOR_CREATED}"
