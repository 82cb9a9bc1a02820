# Recovers the data folder $2 with the server's programs in $1 and the files in $3, on a socket of its own, and says where it came to.
#
# restore_command asks with a line "want NAME" on this script's stdout and reads the answer from its stdin; see fetch.sh.
set -eu
bin=$1 data=$2 work=$3 user=$4
owner=$(stat -c %u "$data") group=$(stat -c %g "$data") as=
if [ "$(id -u)" = 0 ]; then
  if command -v gosu >/dev/null; then
    as="gosu $owner:$group"
  elif command -v su-exec >/dev/null; then
    as="su-exec $owner:$group"
  else
    as="setpriv --reuid=$owner --regid=$group --clear-groups --"
  fi
fi
sockets=$(mktemp -d /tmp/ai-micro-backup.XXXXXX)
trap 'rm -rf "$sockets"' EXIT
if [ "$as" ]; then chown "$owner:$group" "$sockets"; fi
exec 3<&0 </dev/null
(exec $as "$bin/postgres" -D "$data" -c "config_file=$work/postgresql.conf" -c "unix_socket_directories=$sockets" \
  <&3 2>"$work/log") &
server=$!
ask() {
  "$bin/psql" --no-psqlrc --quiet --no-align --tuples-only --host="$sockets" --port=5432 --username="$user" \
    --dbname=template1 --command="$1" 2>/dev/null
}
failed() {
  found=$(grep -E '(FATAL|PANIC|ERROR): ' "$work/log" | grep -v 'the database system is' | tail -n 5)
  [ "$found" ] || found=$(tail -n 3 "$work/log")
  printf '%s\n' "$found" >&2
  exit 1
}
until reached=$(ask "
  SELECT json_build_object('lsn', pg_last_wal_replay_lsn(), 'last_commit', pg_last_xact_replay_timestamp(),
    'wal_file', pg_walfile_name(pg_current_wal_lsn()),
    'system_identifier', (SELECT system_identifier::text FROM pg_control_system()),
    'databases', (SELECT json_agg(datname ORDER BY datname) FROM pg_database))"); do
  kill -0 "$server" 2>/dev/null || failed
  sleep 0.2
done
kill -INT "$server"
wait "$server" || failed
stopped=$(sed -n 's/.*LOG:  \(recovery stopping .*\)/\1/p' "$work/log" | tail -n 1)
printf 'stopped %s\nreached %s\n' "$stopped" "$reached"
