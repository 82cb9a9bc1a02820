#!/usr/bin/env bash
# A Docker engine for the demo and the tests, on a machine that may have none.
#
#   compose/engine.sh start                  use the engine that answers; else, as root on Debian, install and start one
#   compose/engine.sh stop                   stop the dockerd that `start` started, and no other (a systemd service stays)
#   compose/engine.sh status                 say what answers; exit 0 when an engine, compose v2 and buildx are there
#   compose/engine.sh base-images [SUITE…]   make debian:SUITE-slim available (trixie and bookworm when none is named):
#                                            pulled, or bootstrapped from the machine's own apt mirror where no registry answers
#
# Every command can be repeated: it does nothing, fast, when all is there. Settings, from the environment:
#   ENGINE_STATE   folder for dockerd's pid file and log (default: var/engine in the repository)
#   ENGINE_WAIT    seconds to wait for a started engine (default 60)
#   PULL_TIMEOUT   seconds a pull may take before the bootstrap is tried (default 120)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
state=${ENGINE_STATE:-$(dirname "$here")/var/engine}
pid_file=$state/dockerd.pid
log_file=$state/dockerd.log
socket=/var/run/docker.sock
plugin_suite=trixie # the first Debian release whose own packages hold compose v2 and buildx
export DEBIAN_FRONTEND=noninteractive

say() { printf 'engine: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

answers() { timeout 20 docker info >/dev/null 2>&1; }
has_compose() { timeout 20 docker compose version >/dev/null 2>&1; }
has_buildx() { timeout 20 docker buildx version >/dev/null 2>&1; }
apt() { apt-get -qq -o DPkg::Lock::Timeout=180 -o Acquire::Retries=3 "$@" >>"$state/apt.log" 2>&1; }
apt_or_die() { apt "$@" || { tail -n 20 "$state/apt.log" >&2; die "apt-get $1 failed; the whole output is in $state/apt.log"; }; }
candidate() { apt-cache policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: //p' | grep -v '(none)' || true; }
is_debian() { command -v apt-get >/dev/null && [ -e /etc/debian_version ]; }

# The address this machine already takes its own release's packages from, so that no mirror is written down here.
mirror() {
    apt-get indextargets --format '$(REPO_URI) $(COMPONENT) $(ORIGIN) $(LABEL)' 'Created-By: Packages' 2>/dev/null |
        awk '$2 == "main" && $3 == "Debian" && $4 == "Debian" { print $1; exit }'
}

require_installer() { # what is missing
    local missing=$1
    [ "$(id -u)" = 0 ] && is_debian && return
    say "$missing, and this script installs it only as root on Debian."
    say "Install Docker Engine 20.10 or later with the plugins compose v2 and buildx, see that \`docker info\` and"
    say "\`docker compose version\` work for this user, then repeat. On Debian 13 and later, as root:"
    say "    apt-get install docker.io docker-cli docker-compose docker-buildx iptables && systemctl start docker"
    exit 1
}

update_once() {
    [ -n "${updated:-}" ] || apt_or_die update
    updated=yes
}

install_engine() {
    command -v dockerd >/dev/null && command -v iptables >/dev/null && command -v docker >/dev/null && return
    require_installer "no Docker engine answers"
    say "installing docker.io and iptables"
    update_once
    local packages=(docker.io iptables)
    [ -z "$(candidate docker-cli)" ] || command -v docker >/dev/null || packages+=(docker-cli)
    apt_or_die install -y --no-install-recommends "${packages[@]}"
    hash -r
}

# Compose v2 and buildx: from this release when it has them, else those of trixie (they need no newer libc than
# bookworm's), through a source that lives in a temporary folder and is gone afterwards.
install_plugins() {
    local wanted=() private=() package
    has_compose || wanted+=(docker-compose)
    has_buildx || wanted+=(docker-buildx)
    [ ${#wanted[@]} = 0 ] && return
    require_installer "${wanted[*]} missing"
    update_once
    for package in "${wanted[@]}"; do
        if [ -n "$(candidate docker-compose-v2)" ] && [ "$package" = docker-compose ]; then package=docker-compose-v2; fi
        case $(candidate "$package") in
            "" | 1.*) [ "$package" = docker-buildx ] && [ -n "$(candidate docker-buildx)" ] || { private+=("$package"); continue; } ;;
        esac
        say "installing $package"
        apt_or_die install -y --no-install-recommends "$package"
    done
    [ ${#private[@]} = 0 ] && return
    say "installing ${private[*]} of Debian $plugin_suite"
    local folder
    folder=$(mktemp -d)
    mkdir -p "$folder/lists/partial"
    chmod 755 "$folder" "$folder/lists"
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' "$(mirror)" "$plugin_suite" >"$folder/sources.list"
    local options=(-o "Dir::Etc::sourcelist=$folder/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$folder/lists"
        -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache=")
    apt "${options[@]}" update && apt "${options[@]}" install -y --no-install-recommends --no-upgrade "${private[@]}" ||
        { rm -rf "$folder"; tail -n 20 "$state/apt.log" >&2; die "compose v2 and buildx could not be installed"; }
    rm -rf "$folder"
}

wait_for_engine() { # seconds
    local deadline=$((SECONDS + $1))
    until answers; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        started_alive || return 1
        sleep 0.3
    done
}

# Is the process that `start` recorded still that dockerd? (A reused pid is not.)
started_alive() {
    [ -s "$pid_file" ] && [ "$(cat "/proc/$(cat "$pid_file")/comm" 2>/dev/null)" = dockerd ]
}

start_engine() {
    [ "$(id -u)" = 0 ] || require_installer "no Docker engine answers"
    if [ -d /run/systemd/system ]; then
        say "starting the docker service"
        systemctl start docker || die "the docker service did not start; see: journalctl -u docker"
        local deadline=$((SECONDS + ${ENGINE_WAIT:-60}))
        until answers; do
            [ "$SECONDS" -lt "$deadline" ] || die "the docker service does not answer; see: journalctl -u docker"
            sleep 0.3
        done
        return
    fi
    if ! started_alive; then
        say "starting dockerd, its log is $log_file"
        # 9 is this script's lock: dockerd must not hold it. The package's init script may have left a stale pid file.
        rm -f "$pid_file"
        setsid dockerd --host "unix://$socket" --pidfile "$state/dockerd.self.pid" </dev/null >>"$log_file" 2>&1 9>&- &
        echo $! >"$pid_file"
    fi
    if ! wait_for_engine "${ENGINE_WAIT:-60}"; then
        tail -n 20 "$log_file" >&2
        die "dockerd did not answer within ${ENGINE_WAIT:-60} s; its whole log is $log_file"
    fi
}

start() {
    if ! { command -v docker >/dev/null && answers; }; then
        install_engine
        answers || start_engine
    fi
    install_plugins
    status
}

stop() {
    if ! started_alive; then
        rm -f "$pid_file"
        say "no engine was started from here"
        return
    fi
    local pid deadline=$((SECONDS + 60))
    pid=$(cat "$pid_file")
    kill -TERM "$pid"
    while started_alive && [ "$(awk '/^State/ { print $2 }' "/proc/$pid/status" 2>/dev/null)" != Z ]; do
        [ "$SECONDS" -lt "$deadline" ] || die "dockerd (pid $pid) did not end within 60 s; see $log_file"
        sleep 0.2
    done
    rm -f "$pid_file"
    say "stopped"
}

status() {
    command -v docker >/dev/null && answers || { say "no engine answers"; return 1; }
    has_compose || { say "the engine answers, compose v2 is missing"; return 1; }
    has_buildx || { say "the engine answers, buildx is missing"; return 1; }
    say "engine $(docker version --format '{{.Server.Version}}'), compose $(docker compose version --short) and buildx are there"
}

# A root file system as the registry's own image has it, without what a container never reads.
bootstrap() { # suite, image
    local suite=$1 image=$2 folder
    folder=$(mktemp -d)
    # shellcheck disable=SC2064
    trap "rm -rf '$folder'" EXIT
    local from
    from=$(mirror)
    debootstrap --variant=minbase "$suite" "$folder" ${from:+"$from"} >"$state/debootstrap-$suite.log" 2>&1 || {
        tail -n 20 "$state/debootstrap-$suite.log" >&2
        die "debootstrap $suite failed"
    }
    tar -C "$folder" --numeric-owner --exclude='./var/cache/apt/*.bin' --exclude='./var/cache/apt/archives/*.deb' --exclude='./var/lib/apt/lists/*' \
        --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' --exclude='./dev/*' -c . |
        docker import --change 'CMD ["bash"]' - "$image" >/dev/null
    say "bootstrapped $image"
}

pull() { # suite
    timeout "${PULL_TIMEOUT:-120}" docker pull -q "debian:$1-slim" >"$state/pull-$1.log" 2>&1 && say "pulled debian:$1-slim"
}

base_images() {
    answers || die "no engine answers; run: compose/engine.sh start"
    local suites=("$@") suite missing=() jobs=() job failed=0
    [ ${#suites[@]} -gt 0 ] || suites=(trixie bookworm)
    for suite in "${suites[@]}"; do
        docker image inspect "debian:$suite-slim" >/dev/null 2>&1 || pull "$suite" || missing+=("$suite")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "no registry gives debian:${missing[0]}-slim ($(tail -n 1 "$state/pull-${missing[0]}.log" | cut -c1-120)); bootstrapping ${missing[*]}"
    [ "$(id -u)" = 0 ] && is_debian || die "only root on Debian can bootstrap a base image; give the engine a registry it can pull from"
    if ! command -v debootstrap >/dev/null; then
        update_once
        apt_or_die install -y --no-install-recommends debootstrap gpgv debian-archive-keyring
    fi
    for suite in "${missing[@]}"; do (bootstrap "$suite" "debian:$suite-slim") & jobs+=($!); done
    for job in "${jobs[@]}"; do wait "$job" || failed=1; done
    return $failed
}

# One at a time: two test sessions may start together.
locked() {
    mkdir -p "$state"
    exec 9>"$state/lock"
    flock -w 900 9 || die "another engine.sh has held $state/lock for 15 minutes"
}

case ${1:-} in
    start) locked; start ;;
    stop) locked; stop ;;
    status) status ;;
    base-images) locked; shift; base_images "$@" ;;
    *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
