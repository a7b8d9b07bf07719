#!/bin/bash
# What the official image's entrypoint does: create the cluster on the first start, behind a unix socket so
# that nobody outside sees a half-made server, then exec the real one as the postgres user.
set -euo pipefail

# VAR or VAR_FILE, never both.
file_env() {
    local name=$1 file_name=$1_FILE default=${2:-}
    if [ -n "${!name:-}" ] && [ -n "${!file_name:-}" ]; then
        echo >&2 "error: both $name and $file_name are set (but are exclusive)"
        exit 1
    fi
    local value=$default
    if [ -n "${!name:-}" ]; then
        value=${!name}
    elif [ -n "${!file_name:-}" ]; then
        value=$(< "${!file_name}")
    fi
    export "$name"="$value"
    unset "$file_name"
}

create_cluster() {
    if [ -z "$POSTGRES_PASSWORD" ] && [ "${POSTGRES_HOST_AUTH_METHOD:-}" != trust ]; then
        echo >&2 "Error: Database is uninitialized and superuser password is not specified."
        exit 1
    fi
    eval "set -- ${POSTGRES_INITDB_ARGS:-}"
    initdb --username="$POSTGRES_USER" --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD") "$@"
    printf '\nhost all all all %s\n' "${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}" >> "$PGDATA/pg_hba.conf"

    PGUSER=$POSTGRES_USER pg_ctl -D "$PGDATA" -o "-c listen_addresses='' -p 5432" -w start
    local client=(psql -v ON_ERROR_STOP=1 --no-psqlrc --username "$POSTGRES_USER" --no-password)
    if [ "$POSTGRES_DB" != postgres ]; then
        "${client[@]}" --dbname postgres --set db="$POSTGRES_DB" <<< 'CREATE DATABASE :"db";'
    fi
    local file
    for file in /docker-entrypoint-initdb.d/*; do
        case $file in
            *.sh) . "$file" ;;
            *.sql) "${client[@]}" --dbname "$POSTGRES_DB" -f "$file" ;;
        esac
    done
    PGUSER=$POSTGRES_USER pg_ctl -D "$PGDATA" -m fast -w stop
    echo "PostgreSQL init process complete; ready for start up."
}

main() {
    if [ "${1:0:1}" = - ]; then
        set -- postgres "$@"
    fi
    if [ "$1" = postgres ]; then
        if [ "$(id -u)" = 0 ]; then
            mkdir -p "$PGDATA"
            chown -R postgres:postgres "$PGDATA" /var/run/postgresql
            chmod 700 "$PGDATA"
            exec setpriv --reuid postgres --regid postgres --init-groups "$BASH_SOURCE" "$@"
        fi
        file_env POSTGRES_PASSWORD
        file_env POSTGRES_USER postgres
        file_env POSTGRES_DB "$POSTGRES_USER"
        if [ ! -s "$PGDATA/PG_VERSION" ]; then
            create_cluster
        fi
        unset POSTGRES_PASSWORD
    fi
    exec "$@"
}

main "$@"
