# What tpu_vm.sh needs to talk to gcloud, once and for all: time limits, retries, quoting, dry runs. Sourced by it.
# shellcheck shell=bash

# Set by tpu_vm.sh from flags and variables. dry: print commands, run none.
dry='' name=${TPU_NAME:-} zone=${ZONE:-} project=${PROJECT:-} retries=8 backoff=10
# tmp: a folder for outputs. child: the process that is waited for. remind: a slice may be there when we end.
tmp='' timeout='' child='' remind=''

log() { printf '%(%F %T)T %s%s\n' -1 "${dry:+dry run: }" "$*" >&2; }
fail() { # STATUS MESSAGE
  log "error: $2"
  exit "$1"
}

# quote WORD...: QUOTED is these words for a shell to read back, here (--dry-run) or on a worker.
quote() {
  local word
  QUOTED=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    QUOTED+=${QUOTED:+ }$word
  done
}
show() { # COMMAND...: in a dry run print it, and be false
  [[ -n $dry ]] || return 0
  quote "$@"
  printf '%s\n' "$QUOTED"
  return 1
}
# In the background, for bash acts on a signal only between foreground commands.
nap() {
  [[ -z $dry ]] || return 0
  sleep "$1" &
  child=$!
  wait "$child" || true
  child=
}
back_off() { # ATTEMPT REASON
  local seconds=$((backoff << ($1 > 6 ? 5 : $1 - 1)))
  seconds=$((seconds > 300 ? 300 : seconds))
  log "$2; again in $seconds s"
  nap "$seconds"
}

# What only the user can mend. "Quota exceeded ... per minute" is a limit on calls, and passes.
readonly REFUSED='PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|RESOURCE_EXHAUSTED|[Qq]uota|HTTPError 40[0134]'\
'|not found: 404|does not have permission|not currently have an active account|[Rr]eauthentication|invalid_grant'\
'|SSH Key is not present|unrecognized arguments|Invalid value for|argument --'
readonly GONE='NOT_FOUND|matched no objects|/status\.json not found|terminal state|cannot be currently connected'

# call SECONDS ARG...: gcloud, within a time limit, and again after what may pass. Leaves its output in $OUT.
# Returns 0; 4: there is no such thing (any more); 5: the retries are spent; 10, 11, 127: worker.sh refused, its setup
# failed, it is not there. What only the user can mend ends the script with gcloud's own words.
# shellcheck disable=SC2034 # OUT is read by the files that source this one
call() {
  local limit=$1 attempt status why
  shift
  OUT=
  show gcloud "$@" || return 0
  for ((attempt = 1; ; attempt++)); do
    status=0
    "$timeout" --kill-after=10 "$limit" gcloud "$@" </dev/null >"$tmp/out" 2>"$tmp/err" &
    child=$!
    wait "$child" || status=$?
    child=
    OUT=$(<"$tmp/out")
    ((status != 0)) || return 0
    ((status != 10 && status != 11 && status != 127)) || return "$status"
    if grep -q ALREADY_EXISTS "$tmp/err"; then return 0; fi # an earlier try was heard, and answered too late
    if grep -Eq "$GONE" "$tmp/err"; then return 4; fi
    if grep -Eq "$REFUSED" "$tmp/err" && ! grep -q 'per minute' "$tmp/err"; then
      fail 1 "gcloud ${*:1:4}: $(tail -c 2000 "$tmp/err")"
    fi
    why="gcloud ${*:1:4}: $(tail -n 2 "$tmp/err" | tr '\n' ' ')"
    ((status != 124 && status != 137)) || why="gcloud ${*:1:4}: no answer within $limit s"
    if ((attempt > retries)); then
      log "$why; tried $attempt times"
      return 5
    fi
    back_off "$attempt" "$why"
  done
}
out_of_reach() { fail 75 "Google Cloud is out of reach (above). Start this again: it goes on from what is there."; }

tpu() { # SECONDS ARG...
  call "$1" compute tpus "${@:2}" "--zone=$zone" "--project=$project" --quiet
}

# However this ends: nothing of ours goes on here, and nobody is left to find out about a slice from the bill.
on_exit() {
  [[ -z $child ]] || kill "$child" 2>/dev/null || true
  rm -rf "$tmp"
  [[ -n $remind && -z $dry ]] || return 0
  quote launch/tpu_vm.sh delete "--name=$name" "--zone=$zone" "--project=$project"
  log "*** slice $name may still be there and COST MONEY. To delete it: $QUOTED"
}
prepare() {
  timeout=$(command -v timeout || command -v gtimeout) || fail 2 "no \`timeout\` here: install GNU coreutils"
  [[ -n $dry ]] || command -v gcloud >/dev/null || fail 2 "no gcloud here: https://cloud.google.com/sdk/docs/install"
  [[ -z $dry ]] || log "commands are printed and none is run; what is said of the cloud is assumed"
  tmp=$(mktemp -d)
  trap on_exit EXIT
  trap 'log "interrupted; what runs on the slice goes on"; exit 130' INT
  trap 'log "terminated; what runs on the slice goes on"; exit 143' TERM HUP
}
