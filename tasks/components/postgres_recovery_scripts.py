"""What a recovery runs where the server lives, as POSIX sh, and the settings of the server that recovers."""

STAGED = {
    "listen_addresses": "",
    "port": "5432",
    "hot_standby": "off",  # or recovery would need as many connections as the primary had
    "max_connections": "20",
    "max_prepared_transactions": "1000",
    "wal_level": "replica",
    "archive_mode": "on",  # so that the new timeline's history is marked to be archived, which the live server then does
    "archive_command": "",
    "restart_after_crash": "off",
    "autovacuum": "off",
    "max_logical_replication_workers": "0",
    "max_wal_senders": "0",
    "shared_preload_libraries": "",
    "ssl": "off",
    "logging_collector": "off",
    "log_destination": "stderr",
    "lc_messages": "C",
    "log_min_messages": "log",
    "log_timezone": "UTC",
    "timezone": "UTC",
}

FETCH = """\
printf 'want %s\\n' "$1"
read -r answer || exit 255
if [ "$answer" = have ]; then
  mv -f "${0%/*}/wal/$1" "$2" || exit 255
  exit 0
fi
case $1 in
*.history)
  for folder in {folders}; do
    if [ -e "$folder/$1" ]; then cp "$folder/$1" "$2" && exit 0; fi
  done
  ;;
esac
exit 1
"""
"""restore_command. A status above 128 aborts a recovery; 1 says that there is no such file.

Histories of timelines that the store does not have yet are looked for where the server has them: the number of a
timeline, one that was left again by a restore that was taken back for example, must not be given a second time.
"""

FIND_PROGRAMS = """
for folder in "$2" "/usr/lib/postgresql/$1/bin" "/usr/pgsql-$1/bin" "$(dirname "$(command -v postgres || echo none)")"; do
  [ -x "$folder/postgres" ] || continue
  case $("$folder/postgres" --version) in *") $1."*) echo "$folder"; exit ;; esac
done
echo "there is no server program of PostgreSQL $1, of which the base backup is; set bin_dir" >&2
exit 1
"""

LOOK = """
if [ -e "$1/PG_VERSION" ]; then LC_ALL=C "$2/pg_controldata" "$1" | sed -n 's/^Database system identifier: *//p'; fi
"""

REQUIRE_PLACE = """
folder=$1
while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
set -- "$2" "$3" $(df -P -k "$folder" | tail -n 1)
available=$6 mount=$8
[ "$2" = host ] || [ "$mount" != / ] || {
  echo "the data folder is not on a volume of the container, so it cannot be reached while the server is stopped" >&2
  exit 1
}
[ "$available" -ge "$1" ] || {
  echo "$1 kB are needed beside the live data, $available are free" >&2
  exit 1
}
"""

MAKE = """
rm -rf "$1/work"
mkdir -m 700 -p "$1/work/wal" "$1/new/data"
"""

ARRANGE = """
live=$1 staging=$2 data=$2/new/data
owner=$(stat -c %u:%g "$live" 2>/dev/null || echo 0:0)
case $owner in 0:*) owner=$(stat -c %u:%g "$data/PG_VERSION") ;; esac
rm -f "$data/standby.signal" "$data/backup_manifest"
if [ -e "$data/postgresql.auto.conf" ]; then mv "$data/postgresql.auto.conf" "$staging/work/auto.conf"; fi
: >"$data/recovery.signal"
chmod 700 "$data"
if [ "$(id -u)" = 0 ]; then chown "$owner" "$staging" "$staging/new"; [ "$(stat -c %u "${staging%/*}")" != 0 ] || chown "$owner" "${staging%/*}"; chown -R "$owner" "$data" "$staging/work"; fi
LC_ALL=C "$3/pg_controldata" "$data" | sed -n 's/^track_commit_timestamp setting: *//p'
stat -c '%u %g' "$data"
"""
"""Prints whether commit timestamps are tracked, which a server that does not forgets, and the owner of the data."""

CHECK_BLOCKS = """
! LC_ALL=C "$1/pg_controldata" "$2" | grep -q '^Data page checksum version: *0$' || exit 0
checked=$(LC_ALL=C "$1/pg_checksums" --check --pgdata="$2" 2>&1) || { printf '%s\n' "$checked" | tail -n 5 >&2; exit 1; }
printf '%s\n' "$checked" | sed -n 's/^Blocks scanned: *//p'
"""
"""Prints how many blocks have the checksum that is in them; nothing where the cluster has none."""

FINISH = """
staging=$2 data=$2/new/data live=$1
rm -f "$data/recovery.signal" "$data/backup_label.old" "$data/tablespace_map.old" "$data/postmaster.opts"
if [ -e "$staging/work/auto.conf" ]; then cp -p "$staging/work/auto.conf" "$data/postgresql.auto.conf"; fi
if [ "$3" = scratch ]; then
  printf '%s\\n' "archive_mode = off # set by ai-micro-backup: its WAL must not mix with that of the live server" \
    "max_logical_replication_workers = 0 # nor may it take what publishers hold for the live one" \
    >>"$data/postgresql.auto.conf"
  chown "$(stat -c %u:%g "$data")" "$data/postgresql.auto.conf" 2>/dev/null || true
elif [ -e "$live/PG_VERSION" ]; then
  for path in "$live"/*; do
    case ${path##*/} in
    PG_VERSION | base | global | log | pg_hba.conf | pg_ident.conf) ;;
    pg_* | backup_* | tablespace_map* | postmaster.* | *.signal | current_logfiles | core*) continue ;;
    esac
    case ${path##*/} in PG_VERSION | base | global | log) continue ;; esac
    rm -rf "$data/${path##*/}"
    cp -a "$path" "$data/"
  done
fi
sync
"""
"""The settings of the live server hold: all in its data folder that is not the cluster's own data."""
