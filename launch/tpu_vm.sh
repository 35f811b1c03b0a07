#!/usr/bin/env bash
# Rent a TPU slice, train on it, and go on after preemptions. What runs on the slice's hosts is in worker.sh.
set -euo pipefail

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "tpu_vm.sh needs bash 4.4 or newer (macOS: brew install bash coreutils)" >&2
  exit 2
}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=launch/slice.sh
source "$here/slice.sh"

usage() {
  cat <<'END'
usage: launch/tpu_vm.sh COMMAND [flags] [CONFIG [a.b=c ...]]

  create                 request a slice (a queued resource and its node, both called NAME)
  setup                  wait until it is ready, install Python and the checkout's HEAD on all its hosts
  run CONFIG [a.b=c]     start `dynamo-jax train` on all hosts, detached from this machine
  logs                   follow the log (--worker N or all, --lines N, --no-follow)
  status [CONFIG]        states of the slice and its hosts; with CONFIG (or --run) the run's own status, too
  stop                   SIGTERM: the run saves and ends; the slice stays, and costs money
  delete                 delete the slice with its disks (asks; --yes does not)
  supervise CONFIG [a.b=c]  all of it: create, set up, run, watch, again after a preemption or a crash, until the run
                         is complete. Can be ended and started at any time and anywhere: it picks up what is there.

Settings: a flag or a variable; nothing that costs money has a default.
  --name NAME              TPU_NAME           slice
  --zone ZONE              ZONE
  --project PROJECT        PROJECT
  --accelerator-type TYPE  ACCELERATOR_TYPE   such as v5litepod-16       (create, supervise)
  --runtime-version V      RUNTIME_VERSION    such as v2-alpha-tpuv5-lite (create, supervise)
  --bucket BUCKET          BUCKET             run folder: gs://BUCKET/runs/RUN, unless run_dir=... is given
  --run RUN                RUN_NAME           name of the run (default: CONFIG's, without .yaml)
  --spot | --on-demand | --reserved           kind of capacity, one of them (create, supervise)
  --data gs://..., --models gs://...          DATA, MODELS: copied into each checkout's data/ and models/ by setup

Other flags
  --dry-run                print every command, run nothing
  --yes                    delete without asking
  --again                  setup: install and copy even if this commit is there
  --delete-when-done       supervise: delete the slice once the run is complete
  --valid-until-duration D create: leave the queue after D, such as 6h
  --create-flag=FLAG       one more flag for `queued-resources create`, such as --create-flag=--internal-ips; repeatable
  --connect-flag=FLAG      one more flag for ssh and scp, such as --connect-flag=--internal-ip; repeatable
  --worker N               logs: which host, or all (default 0)
  --lines N                logs: how many lines of the past (default 50)
  --no-follow              logs: only these
  --poll S                 seconds between looks (default 30)
  --call-timeout S         limit of one gcloud call (default 180); setup: --setup-timeout S (default 3600)
  --retries N              how often a gcloud call is tried again (default 8)
  --backoff S              first wait before trying again; doubles up to 300 s (default 10)
  --max-failures N         supervise: crashes in a row without a new step before it gives up (default 5; for temporary
                           failures four times as many)
  --settle S               supervise: how long hosts may go on after another has ended (default 300)
  --grace S                from SIGTERM to SIGKILL (default 120)

For slices of many hosts gcloud wants its key in an agent: ssh-add ~/.ssh/google_compute_engine
Exit status: 0 done; 1 refused by Google Cloud, or given up; 2 yours to mend; 75 Google Cloud out of reach, start again;
128+n stopped by signal n.
END
}

# progress: read the run's status; a new step forgives the failures before it.
progress() {
  read_status
  ((STEP > best)) || return 0
  log "run $run: $RUN_STATE, $AT of $STEPS"
  best=$STEP crashes=0 hiccups=0
}
# failed crash|temporary MESSAGE: count it, and wait or give up.
failed() {
  if [[ $1 == crash ]]; then crashes=$((crashes + 1)); else hiccups=$((hiccups + 1)); fi
  if ((crashes >= max_failures || hiccups >= 4 * max_failures)); then
    show_log
    fail 1 "$2; gave up after $((crashes + hiccups)) failures without a new step"
  fi
  back_off "$((crashes + hiccups))" "$2"
}
show_log() { # [exit:N]
  local status=0
  remote "$call_timeout" all log 40 "$@" || status=$?
  ((status != 0)) || tail -n 120 <<<"$OUT" >&2
}

# after_end: the run we watched has ended on all hosts, and is not complete.
after_end() {
  local end kind=temporary
  for end in "${ENDS[@]}"; do
    case $end in
      exit:2)
        show_log exit:2
        fail 2 "the run ended with a mistake of yours to mend (above), so it is not started again" ;;
      stopped:*)
        log "the run was stopped by its user, so it is not started again"
        exit 143 ;;
      exit:75 | exit:129 | exit:130 | exit:143 | gone) ;; # by itself, by a signal, by a reboot
      *) kind=crash ;;
    esac
  done
  failed "$kind" "the run ended at $AT (${ENDS[*]})"
}

# ready: one look at a slice that is READY, and what follows from it.
ready() {
  local status=0
  look || status=$?
  ((status != 4)) || return 0 # gone since: the next look at the slice says how
  if ((status != 0 || HOSTS == 0)); then
    # Never reached: our key or the firewall, and a new slice would not help. Reached before: a host hangs.
    [[ $reached ]] || out_of_reach
    local before=$best
    failed crash "slice $name does not answer over ssh any more"
    progress
    ((best == before)) || return 0 # it trains all the same
    remove
    return
  fi
  reached=1
  [[ -z $OTHER ]] || fail 2 "slice $name is busy with run $OTHER: stop that first, or use another slice"
  if ((RUNNING == HOSTS)); then
    [[ $watching ]] || log "run $run is going on $HOSTS host(s); watching"
    watching=1 partial=
  elif ((RUNNING > 0)); then
    partial=${partial:-$SECONDS} watching=1
    log "$RUNNING of $HOSTS hosts still run; the others: ${ENDS[*]}"
    if ((SECONDS - partial >= settle)); then
      remote "$((${call_timeout%.*} + grace))" all stop "$grace" restart || status=$?
    fi
  else
    progress # it may have come further since the last look
    [[ $RUN_STATE != complete ]] || return 0
    if [[ -n $watching ]]; then
      watching='' partial=''
      after_end
    fi
    if [[ ! $INSTALLED ]]; then install || status=$?; fi
    if ((status == 0)); then start || status=$?; fi
    case $status in
      0) watching=1 ;;
      4) ;; # gone since
      *) failed crash "setup or start failed: $(tail -c 1500 "$tmp/err")" ;;
    esac
  fi
}

do_create() {
  slice
  case $STATE in
    NONE) create && log "requested; \`setup\` waits for it" ;;
    DEAD) fail 1 "slice $name exists but is $queue: delete it first" ;;
    *) log "slice $name exists already; nothing to do" ;;
  esac
}
do_setup() {
  local status=0
  wait_ready
  look || status=$?
  ((status == 0)) || out_of_reach
  if [[ $INSTALLED && ! $again ]] && ((HOSTS > 0)); then
    log "commit ${commit:0:12} is installed on all $HOSTS host(s) already"
    return
  fi
  ((RUNNING == 0)) || fail 1 "a run is going on $name; stop it before setting up"
  install || status=$?
  ((status == 0)) || fail 1 "setup failed: $(tail -c 2000 "$tmp/err")"
  log "set up"
}
do_run() {
  local status=0
  look || status=$?
  ((status == 0)) || fail 1 "cannot reach slice $name: see \`status\`"
  [[ -z $OTHER ]] || fail 1 "slice $name is busy with run $OTHER: stop that first, or use another slice"
  if ((RUNNING > 0)); then
    log "run $run is going on $RUNNING of $HOSTS host(s) already; not started again"
    return
  fi
  [[ $INSTALLED ]] || log "warning: the hosts do not have commit ${commit:0:12}, these data and models; see \`setup\`"
  start || status=$?
  ((status != 127)) || fail 1 "the hosts of $name are not set up: \`setup\` first"
  ((status == 0)) || fail 1 "the run was not started: $(tail -c 2000 "$tmp/err")"
  log "started; \`logs\` follows it"
}
do_logs() {
  quote bash dynamo_jax/worker.sh log "$lines" ${follow:+follow}
  local command=(gcloud compute tpus tpu-vm ssh "$name" "--worker=$worker" "--command=$QUOTED" "${connect_flags[@]}"
    "--zone=$zone" "--project=$project" --quiet)
  show "${command[@]}" || return 0
  exec "${command[@]}" # without a time limit: it is watched by who started it
}
report() { # FORMAT WORD...
  # shellcheck disable=SC2059 # the format is the caller's
  [[ -n $dry ]] || printf "$@"
}
do_status() {
  slice
  report 'slice %s: %s (queued resource %s)\n' "$name" "$STATE" "$queue"
  if [[ $STATE == READY ]]; then
    if look; then report '%s' "$REPORT"; else report 'the hosts do not answer\n'; fi
  fi
  if [[ $run_dir == gs://* ]]; then
    read_status
    if ((STEP < 0)); then
      report 'run %s: has not begun, or not yet said so\n' "$run_dir"
    else
      report 'run %s: %s, %s of %s\n%s\n' "$run_dir" "$RUN_STATE" "$AT" "$STEPS" "$OUT"
    fi
  fi
}
do_stop() {
  local status=0
  log "SIGTERM; the run saves and ends (SIGKILL after $grace s)"
  remote "$((${call_timeout%.*} + grace))" all stop "$grace" user || status=$?
  case $status in
    0) log "stopped. The slice is still there and costs money." ;;
    4) log "there is no slice $name that could run anything" ;;
    127) log "nothing was ever set up on slice $name, so nothing runs" ;;
    *) fail 75 "cannot tell whether the run has stopped: $(tail -c 1000 "$tmp/err")" ;;
  esac
}
do_delete() {
  local answer=
  if [[ ! $yes && ! $dry ]]; then
    [[ -t 0 ]] || fail 2 "there is no terminal to ask on: add --yes to delete $name without asking"
    read -r -p "Delete slice $name ($project, $zone) with its disks and whatever runs on it? [y/N] " answer
    [[ $answer == [yY]* ]] || fail 1 "not deleted"
  fi
  dry_queue=ACTIVE
  slice
  if [[ $STATE == NONE ]]; then log "there is no slice $name; nothing to delete"; else remove; fi
}
do_supervise() {
  local start
  [[ $run_dir == gs://* ]] || fail 2 "run_dir=$run_dir would be lost with the slice: give a gs:// folder"
  # best: the last step seen. crashes, hiccups: failures since. created: requests without an answer.
  # watching: we saw the run going, so how it ends is ours to judge. reached: this slice has answered over ssh.
  best=-1 crashes=0 hiccups=0 created=0 watching='' reached='' partial=''
  while :; do
    progress
    [[ $RUN_STATE != complete ]] || break
    slice
    [[ $STATE == NONE ]] || created=0 remind=1
    case $STATE in
      NONE)
        created=$((created + 1)) watching='' reached='' partial=''
        ((created <= 3)) || fail 1 "slice $name was requested $((created - 1)) times and is still not there"
        create ;;
      DEAD)
        if [[ $queue == FAILED ]]; then
          tpu "$call_timeout" queued-resources describe "$name" '--format=value(state.failedData.error.message)' || true
          log "the request failed: $OUT"
          [[ -z $valid_until_duration ]] || fail 1 "the request was not met within $valid_until_duration"
          failed crash "no slice"
        fi
        remove
        continue ;;
      READY) ready ;;
    esac
    nap "$poll"
  done
  if [[ $dry ]]; then
    log "from here on as if run $run were complete; really it is watched until it is: $run_dir"
  else
    log "run $run is complete at $AT of $STEPS: $run_dir"
  fi
  slice
  if [[ $STATE == NONE ]]; then
    remind=
  elif [[ $delete_when_done ]]; then
    # The run is complete before its processes are: let them end by themselves.
    start=$SECONDS
    while [[ $STATE == READY ]] && ((SECONDS - start < settle)) && look && ((RUNNING > 0)) && [[ ! $dry ]]; do
      nap "$poll"
    done
    remove
  else
    remind=1
  fi
}

need() { # VARIABLE...: one error for all settings that are missing
  local variable missing=''
  for variable; do
    [[ -z ${!variable} ]] || continue
    if [[ $variable == capacity ]]; then
      missing+=$'\n  --spot, --on-demand or --reserved'
    else
      missing+=$'\n'"  --${variable//_/-} or ${VARIABLES[$variable]}"
    fi
  done
  [[ -z $missing ]] || fail 2 "missing:$missing"
}

# The workers get HEAD, so that is where CONFIG must be. Given from here or from the checkout's root.
find_config() {
  [[ -n $config ]] || fail 2 "which CONFIG? such as configs/qwen2.5_math_1.5b.yaml"
  if [[ -e $config ]]; then config=$(cd "$(dirname "$config")" && pwd -P)/${config##*/}; fi
  config=${config#"$root"/}
  git -C "$root" cat-file -e "$commit:$config" 2>/dev/null ||
    fail 2 "CONFIG $config is not in the checkout's HEAD, which is what the workers get: commit it"
}

declare -A VARIABLES=([name]=TPU_NAME [zone]=ZONE [project]=PROJECT [accelerator_type]=ACCELERATOR_TYPE
  [runtime_version]=RUNTIME_VERSION [bucket]=BUCKET [run]=RUN_NAME [data]=DATA [models]=MODELS)

bucket=${BUCKET:-} yes='' follow=1 delete_when_done='' worker=0 lines=50 max_failures=5 settle=300 grace=120

verb=${1:---help}
case $verb in
  create | setup | run | logs | status | stop | delete | supervise) shift ;;
  --help | -h | help) usage && exit ;;
  *) usage >&2 && fail 2 "no such command: $verb" ;;
esac
while (($# > 0)); do
  case $1 in
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    --help | -h) usage && exit ;;
    --dry-run) dry=1 ;;
    --yes) yes=1 ;;
    --again) again=1 ;;
    --no-follow) follow='' ;;
    --delete-when-done) delete_when_done=1 ;;
    --spot | --on-demand | --reserved)
      [[ -z $capacity || $capacity == "${1#--}" ]] || fail 2 "--$capacity and $1: one of them"
      capacity=${1#--} ;;
    --name | --zone | --project | --bucket | --run | --data | --models | --accelerator-type | --runtime-version | \
      --valid-until-duration | --create-flag | --connect-flag | --worker | --lines | --poll | --call-timeout | \
      --setup-timeout | --retries | --backoff | --max-failures | --settle | --grace)
      [[ -n ${2:-} ]] || fail 2 "$1 needs a value"
      case $1 in
        --create-flag) create_flags+=("$2") ;;
        --connect-flag) connect_flags+=("$2") ;;
        *) flag=${1#--} && printf -v "${flag//-/_}" %s "$2" ;;
      esac
      shift ;;
    -*) fail 2 "no such flag: $1 (see --help)" ;;
    *)
      [[ $verb =~ ^(run|status|supervise)$ ]] || fail 2 "$verb takes no $1"
      if [[ -z $config ]]; then
        config=$1
      else
        [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_.]*= ]] || fail 2 "$1 is not an override such as trainer.steps=100"
        overrides+=("$1")
      fi ;;
  esac
  shift
done
for number in lines call_timeout setup_timeout retries backoff max_failures settle grace poll; do
  [[ ${!number} =~ ^(0|[1-9][0-9]*)$ || ($number =~ ^(poll|call_timeout)$ && ${!number} =~ ^[0-9]+\.[0-9]+$) ]] ||
    fail 2 "--${number//_/-} ${!number} is not a number of seconds or things"
done

need name zone project
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail 2 "--name $name: lower-case letters, digits and dashes"
bucket=${bucket#gs://} bucket=${bucket%/}
if [[ -z $run && -n $config ]]; then run=${config##*/} run=${run%.*}; fi
[[ -z $run || $run =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail 2 "--run $run: letters, digits, dots, dashes, underscores"
for override in "${overrides[@]}"; do
  [[ $override != run_dir=* ]] || run_dir=${override#run_dir=} run_dir=${run_dir%/}
done
if [[ -z $run_dir && -n $bucket && -n $run ]]; then
  run_dir=gs://$bucket/runs/$run
  overrides=("run_dir=$run_dir" "${overrides[@]}")
fi
if [[ $verb =~ ^(setup|run|supervise)$ ]]; then
  if ! root=$(git -C "$here" rev-parse --show-toplevel) || ! commit=$(git -C "$root" rev-parse HEAD); then
    fail 2 "this is not a git checkout, and its HEAD is what the workers get"
  fi
  stamp=$commit,${data:--},${models:--}
  [[ ! $stamp =~ [[:space:]] ]] || fail 2 "--data and --models: addresses without spaces"
fi
case $verb in
  create) need accelerator_type runtime_version capacity ;;
  run)
    find_config
    [[ -n $run_dir ]] || need bucket ;;
  supervise)
    find_config
    if [[ -n $run_dir ]]; then
      need accelerator_type runtime_version capacity
    else
      need accelerator_type runtime_version capacity bucket
    fi ;;
esac
if [[ $verb == create || $verb == supervise ]]; then dry_queue=NONE; fi
if [[ $verb == run ]]; then dry_host="DYNAMO_JAX - $stamp - none"; fi
prepare
"do_$verb"
