#!/bin/sh
# Write PgBouncer's user list, which needs the password itself to log in at the server, and become PgBouncer.
# Only builtins and pipes see the password, so it is in no process's arguments.
set -eu
umask 077
password=$(sed 's/"/""/g' < "$POSTGRES_PASSWORD_FILE")
printf '"%s" "%s"\n' "$POSTGRES_USER" "$password" > /run/pgbouncer/userlist.txt
unset password
exec /usr/sbin/pgbouncer /etc/pgbouncer/pgbouncer.ini
