#!/usr/bin/env bash
# What happens on each host of a slice: launch/tpu_vm.sh brings this file there and calls it over ssh.
#   setup STAMP DATA MODELS [again]       install the archive that was copied to ~/dynamo_jax.tar.gz
#   start RUN CONFIG [a.b=c ...]          start `dynamo-jax train`, unless it runs
#   state                                 one line: DYNAMO_JAX host stamp run none|running|gone|exit:N|stopped:N
#   stop SECONDS user|restart             SIGTERM, and SIGKILL if that long was not enough
#   log LINES [follow|exit:N]             the end of the run's log (exit:N: only if the run ended so)
# Exit status 10: not now, 11: the setup failed. Others may be ssh's, and tpu_vm.sh tries again.
set -euo pipefail

home=$HOME/dynamo_jax
lock=$home/lock

# The lock is held by the process that waits for the trainer, as long as it lives. A pid alone would be trusted too far:
# after a reboot it belongs to someone else.
is_running() {
  [ -f "$lock" ] && ! flock --nonblock --shared "$lock" true
}

write() { # FILE TEXT: never half a file, whatever happens meanwhile
  printf '%s\n' "$2" >"$home/$1.new"
  mv "$home/$1.new" "$home/$1"
}

value() { # FILE: its line, or a dash
  cat "$home/$1" 2>/dev/null || echo -
}

refuse() { # MESSAGE
  echo "$(hostname): $1" >&2
  exit 10
}

state() {
  local now=none
  if is_running; then
    now=running
  elif [ -f "$home/exit" ]; then
    now=$(value exit)
  elif [ -f "$home/run" ]; then
    now=gone # no exit status: the host was rebooted, or the waiting process was killed
  fi
  printf 'DYNAMO_JAX %s %s %s %s\n' "$(hostname)" "$(value stamp)" "$(value run)" "$now"
}

# Python of 3.11 to 3.13 with venv. The images of most runtimes have 3.10, and a fresh VM's apt is often locked by its
# own upgrades; uv needs neither apt nor root nor someone's package archive, and brings the interpreter with it.
make_venv() {
  local python good='import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c "$good" 2>/dev/null; then
      "$python" -m venv --clear "$home/venv"
      return
    fi
  done
  if ! command -v uv >/dev/null; then
    python3 -m pip install --quiet --upgrade --target "$home/uv" uv || {
      echo "no Python of 3.11 to 3.13 with venv, and pip cannot install uv: give the slice access to PyPI" \
        "(external IPs or Cloud NAT), or install python3.11 and python3.11-venv on each host" >&2
      return 1
    }
    PATH=$home/uv/bin:$PATH
  fi
  rm -rf "$home/venv"
  uv venv --quiet --python '>=3.11,<3.14' --seed "$home/venv" || {
    echo "uv cannot download Python: give the slice access to the internet (external IPs or Cloud NAT)," \
      "or install python3.11 and python3.11-venv on each host" >&2
    return 1
  }
}

setup() { # STAMP DATA MODELS [again]
  local stamp=$1 data=$2 models=$3 again=${4:-}
  mkdir -p "$home/logs"
  exec 8>>"$home/setup.lock"
  flock --wait 1 8 || refuse "another setup is going"
  if [ "$(value stamp)" = "$stamp" ] && [ -z "$again" ]; then
    return
  fi
  ! is_running || refuse "a run is going; stop it before setting up"
  rm -f "$home/stamp" # until the setup is done `start` refuses
  trap '[ $? = 0 ] || { echo "$(hostname): the setup failed" >&2; exit 11; }' EXIT
  rm -rf "$home/checkout"
  mkdir -p "$home/checkout" "$home/data" "$home/models"
  tar -xzf "$HOME/dynamo_jax.tar.gz" -C "$home/checkout"
  # Beside the checkout, so that new code does not fetch the data again.
  ln -sfn ../data "$home/checkout/data"
  ln -sfn ../models "$home/checkout/models"
  "$home/venv/bin/pip" --version >/dev/null 2>&1 || make_venv
  (cd "$home/checkout" && "$home/venv/bin/pip" install --quiet '.[tpu,gcs]')
  if [ "$data" != - ]; then gcloud storage rsync --recursive "$data" "$home/data" --quiet; fi
  if [ "$models" != - ]; then gcloud storage rsync --recursive "$models" "$home/models" --quiet; fi
  write stamp "$stamp"
}

# setsid and nohup, not a systemd user unit: that one dies with the last ssh session unless lingering is enabled, which
# needs root. In a session of its own the run has no terminal to lose, and its exit status is noted by its own parent.
start() { # RUN CONFIG [a.b=c ...]
  local run=$1 i
  [ -f "$home/stamp" ] || refuse "not set up"
  exec 9>>"$lock"
  if ! flock --wait 1 9; then
    [ "$(value run)" = "$run" ] || refuse "another run is going: $(value run)"
    return
  fi
  rm -f "$home/exit" "$home/pid" "$home/stopped"
  write run "$run"
  setsid nohup bash "$0" hold "$@" </dev/null >>"$home/logs/$run.log" 2>&1 & # inherits the lock
  for ((i = 0; i < 200; i++)); do
    [ -f "$home/pid" ] && return
    sleep 0.05
  done
  echo "$(hostname): the run did not start; see ~/dynamo_jax/logs/$run.log" >&2
  exit 1
}

hold() { # RUN CONFIG [a.b=c ...]: run the trainer and note how it ended
  local status=0 word=exit
  shift
  printf '=== %s %s: dynamo-jax train %s\n' "$(date '+%F %T')" "$(value stamp)" "$*"
  trap : TERM INT # a host that shuts down signals every process; this one stays until the trainer has saved
  (
    write pid "$BASHPID"
    cd "$home/checkout" || exit 1
    # Unbuffered: a killed process must not take its last words with it. The lock is not the trainer's to hold: a worker
    # process that outlives it would keep the next run from starting.
    PYTHONUNBUFFERED=1 exec "$home/venv/bin/dynamo-jax" train "$@" 9>&-
  ) || status=$?
  if [ -f "$home/stopped" ]; then word=stopped; fi
  printf '=== %s exit status %s\n' "$(date '+%F %T')" "$status"
  write exit "$word:$status"
}

stop() { # SECONDS user|restart
  local pid
  is_running || return 0
  # What a user stopped, `supervise` does not start again.
  if [ "$2" = user ]; then write stopped user; fi
  pid=$(value pid)
  [[ $pid =~ ^[0-9]+$ ]] || return 0
  kill -TERM "$pid" 2>/dev/null || true
  if ! flock --wait "$1" "$lock" true; then
    echo "$(hostname): still going after $1 s: SIGKILL" >&2
    kill -KILL "$pid" 2>/dev/null || true
    flock --wait 10 "$lock" true
  fi
}

log() { # LINES [follow|exit:N]
  local file
  case ${2:-} in
    '' | follow) ;;
    *) [ "$(value exit)" = "$2" ] || return 0 ;;
  esac
  file=$home/logs/$(value run).log
  [ -f "$file" ] || {
    echo "$(hostname): no run was started here" >&2
    return 0
  }
  if [ "${2:-}" = follow ]; then
    exec tail -n "$1" -F "$file"
  fi
  echo "== $(hostname): ~/dynamo_jax/logs/${file##*/}"
  tail -n "$1" "$file"
}

case ${1:-} in
  setup | start | state | hold | stop | log) "$@" ;;
  *) sed -n '2,/^set /s/^# //p' "$0" >&2 && exit 1 ;;
esac
