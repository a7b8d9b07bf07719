# The migrator image. Build it with BuildKit; docs/reference/image.md has the arguments, the tags and what the image is made of:
#
#     docker build -t migrator .
#     docker build -t migrator:slim --build-arg VARIANT=slim .
#
# Behind a proxy that re-signs TLS, hand its roots to the build; they reach no layer:
#
#     docker build -t migrator --secret id=ca_certificates,src=/etc/ssl/certs/ca-certificates.crt .

ARG BASE_IMAGE=debian:trixie-slim
# full, or slim: without PostgreSQL's client, without what reaches a bucket, without encryption.
ARG VARIANT=full

# The client programs of PG_MAJOR, by default the newest that apt knows, so that Debian's security updates reach them.
FROM ${BASE_IMAGE} AS client
ARG PG_MAJOR=
RUN --mount=type=bind,source=image,target=/image \
    --mount=type=secret,id=apt_sources \
    --mount=type=secret,id=ca_certificates \
    /image/install client ${PG_MAJOR}

# What runs: Debian's Python, or the base's own.
FROM client AS runtime-full
RUN --mount=type=bind,source=image,target=/image \
    --mount=type=secret,id=apt_sources \
    --mount=type=secret,id=ca_certificates \
    /image/install python

# psycopg 3 is pure Python on Debian's libpq, which comes with the client programs in the full image.
FROM ${BASE_IMAGE} AS runtime-slim
RUN --mount=type=bind,source=image,target=/image \
    --mount=type=secret,id=apt_sources \
    --mount=type=secret,id=ca_certificates \
    /image/install python libpq5

# What builds, pip first of all, stays in this stage.
FROM runtime-slim AS build
RUN --mount=type=bind,source=image,target=/image \
    --mount=type=secret,id=apt_sources \
    --mount=type=secret,id=ca_certificates \
    set -eu; \
    if [ -x /usr/bin/python3 ]; then venv=python3-venv; fi; \
    /image/install build binutils ${venv:-}

# Bytecode must be the same in every build: its hashes, not times, say what it was compiled from.
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0 SOURCE_DATE_EPOCH=315532800

# Dependencies before source: this layer is rebuilt only when a lock changes. Wheels carry debugging symbols (17 MB);
# the libraries that auditwheel has moved to *.libs are left as they are, for strip breaks some of those.
COPY requirements.lock requirements-build.lock /build/
COPY image/trim.py /build/
RUN --mount=type=secret,id=ca_certificates \
    set -eu; \
    if [ -f /run/secrets/ca_certificates ]; then export PIP_CERT=/run/secrets/ca_certificates; fi; \
    export PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_DISABLE_PIP_VERSION_CHECK=1; \
    python3 -m venv /build/tools; \
    /build/tools/bin/pip install -q --require-hashes --no-deps --only-binary :all: -r /build/requirements-build.lock; \
    python3 -m venv --without-pip /opt/migrator; \
    /build/tools/bin/pip --python /opt/migrator/bin/python install --require-hashes --no-deps --only-binary :all: \
        --report /build/dependencies.json -r /build/requirements.lock; \
    find /opt/migrator -name '*.so' -not -path '*.libs/*' -exec strip --strip-unneeded {} +; \
    python3 /build/trim.py /opt/migrator

COPY pyproject.toml README.md LICENSE /build/
COPY src /build/src
COPY entrypoint.py /opt/migrator/
# The modes of a checkout are those of somebody's umask.
RUN set -eu; \
    chmod -R u=rwX,go=rX /build /opt/migrator/entrypoint.py; \
    export PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_DISABLE_PIP_VERSION_CHECK=1; \
    /build/tools/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /build/dist /build; \
    /build/tools/bin/pip --python /opt/migrator/bin/python install --no-index --no-deps \
        --report /build/migrator.json /build/dist/*.whl; \
    python3 -m compileall -q --invalidation-mode unchecked-hash /opt/migrator

# The full image has Debian's libpq, with the client programs: psycopg2 uses that one.
FROM build AS build-full
RUN set -eu; \
    python3 /build/trim.py /opt/migrator --system-libpq; \
    /opt/migrator/bin/python -c 'import psycopg2'

# The slim one's psycopg2 keeps its wheel's own libpq: its /opt/migrator is copied into images that have none.
FROM build AS build-slim
RUN python3 /build/trim.py /opt/migrator \
        boto3 botocore jmespath pyrage python-dateutil s3transfer six urllib3; \
    python3 -m compileall -q --invalidation-mode unchecked-hash /opt/migrator

FROM build-${VARIANT} AS built

# The bill of materials is of what runs, and written by what does not stay.
FROM runtime-${VARIANT} AS bill
COPY --from=built /opt/migrator /opt/migrator
RUN --mount=type=bind,from=build,source=/build,target=/build \
    --mount=type=bind,source=image,target=/image \
    PYTHONDONTWRITEBYTECODE=1 /build/tools/bin/python /image/sbom.py /opt/migrator \
        /build/dependencies.json /build/migrator.json > /opt/migrator/sbom.cdx.json

FROM runtime-${VARIANT}

COPY --from=bill /opt/migrator /opt/migrator

# HOME: a user id that is not in /etc/passwd has none, and programs look for it.
# SSL_CERT_FILE: for sslrootcert=system; the slim image's psycopg2 has an OpenSSL that looks where its wheel was built.
# PYTHONPATH: what an env.py imports beyond migrator's own dependencies goes to /app/.deps.
ENV PATH=/opt/migrator/bin:/usr/lib/postgresql/client:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
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
ARG BASE_IMAGE
ARG BASE_DIGEST=unknown
ARG MIGRATOR_VERSION=dev
ARG MIGRATOR_REVISION=unknown
ARG MIGRATOR_CREATED=unknown
ARG MIGRATOR_SOURCE=unknown
ENV MIGRATOR_IMAGE_VERSION=${MIGRATOR_VERSION}
LABEL org.opencontainers.image.title="migrator" \
      org.opencontainers.image.description="Waits for Postgres, backs it up, runs Alembic's migrations, verifies" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${MIGRATOR_VERSION}" \
      org.opencontainers.image.revision="${MIGRATOR_REVISION}" \
      org.opencontainers.image.source="${MIGRATOR_SOURCE}" \
      org.opencontainers.image.created="${MIGRATOR_CREATED}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}"
