#!/bin/sh
# Writes the configuration from the environment, then becomes the server (or whatever command is given).
#   REDIS_PASSWORD or REDIS_PASSWORD_FILE   needed
#   REDIS_APPENDONLY   yes or no (default no)
#   REDIS_SAVE         save points (default "3600 1 300 100 60 10000", the server's own; "" for none)
set -eu
umask 077

[ "${1:-redis-server}" = redis-server ] || exec "$@"

if [ -n "${REDIS_PASSWORD_FILE:-}" ]; then REDIS_PASSWORD=$(cat "$REDIS_PASSWORD_FILE"); fi
if [ -z "${REDIS_PASSWORD:-}" ]; then
    echo "entrypoint: REDIS_PASSWORD or REDIS_PASSWORD_FILE is needed" >&2
    exit 1
fi
quoted=$(printf '%s' "$REDIS_PASSWORD" | sed 's/[\\"]/\\&/g')
config=/run/redis.conf
{
    printf 'bind * -::*\nport 6379\ndir /data\n'
    printf 'requirepass "%s"\n' "$quoted"
    printf 'appendonly %s\n' "${REDIS_APPENDONLY:-no}"
    printf 'save "%s"\n' "${REDIS_SAVE-3600 1 300 100 60 10000}"
} >"$config"
chown redis:redis "$config"
# A restored dump.rdb may belong to whoever copied it in.
find /data \! -user redis -exec chown -h redis:redis {} +
shift || true
exec setpriv --reuid=redis --regid=redis --init-groups redis-server "$config" "$@"
