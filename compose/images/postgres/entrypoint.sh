#!/bin/sh
# Makes the cluster at the first start, then becomes the server (or whatever command is given).
set -eu
umask 077

as_postgres() { setpriv --reuid=postgres --regid=postgres --init-groups "$@"; }

if [ "${1:-postgres}" = postgres ]; then
    mkdir -p "$PGDATA"
    chown postgres:postgres "$PGDATA"
    chmod 0700 "$PGDATA"
    if [ ! -s "$PGDATA/PG_VERSION" ]; then
        if [ -n "${POSTGRES_PASSWORD_FILE:-}" ]; then POSTGRES_PASSWORD=$(cat "$POSTGRES_PASSWORD_FILE"); fi
        if [ -z "${POSTGRES_PASSWORD:-}" ]; then
            echo "entrypoint: POSTGRES_PASSWORD or POSTGRES_PASSWORD_FILE is needed to make the cluster" >&2
            exit 1
        fi
        # initdb takes a password only from a file; this one lives as long as initdb does.
        password_file=$(mktemp)
        printf '%s\n' "$POSTGRES_PASSWORD" >"$password_file"
        chown postgres "$password_file"
        as_postgres initdb --username=postgres --pwfile="$password_file" --auth-local=trust --auth-host=scram-sha-256 \
            --encoding=UTF8 --locale=C.UTF-8 --data-checksums --no-instructions || { rm -f "$password_file"; exit 1; }
        rm -f "$password_file"
        printf 'host all all all scram-sha-256\nhost replication all all scram-sha-256\n' >>"$PGDATA/pg_hba.conf"
        printf "listen_addresses = '*'\n" >>"$PGDATA/postgresql.conf"
    fi
    unset POSTGRES_PASSWORD
fi
exec setpriv --reuid=postgres --regid=postgres --init-groups "$@"
