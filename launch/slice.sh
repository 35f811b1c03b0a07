# One slice and the run on it: what there is, and each step of its life. Sourced by tpu_vm.sh.
# shellcheck shell=bash
# shellcheck source=launch/gcloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/gcloud.sh"

# Set by tpu_vm.sh from flags. valid_until_duration, create_flags, connect_flags: passed on to gcloud.
accelerator_type=${ACCELERATOR_TYPE:-} runtime_version=${RUNTIME_VERSION:-} capacity='' valid_until_duration=''
run=${RUN_NAME:-} data=${DATA:-} models=${MODELS:-} config='' overrides=() run_dir='' again=''
create_flags=() connect_flags=() poll=30 call_timeout=180 setup_timeout=3600
# root, commit: the checkout that the workers get. stamp: that commit, with the data and the models.
root='' commit='' stamp=''
# queue, seen: the queued resource's state, and what of it was logged last. dry_*: what a dry run assumes to see.
queue='' seen='' dry_queue=ACTIVE dry_run_state=none dry_host='DYNAMO_JAX - - - none'

ssh_to() { # SECONDS WORKER COMMAND
  tpu "$1" tpu-vm ssh "$name" "--worker=$2" "--command=$3" "${connect_flags[@]}"
}
remote() { # SECONDS WORKER ARG...: one of worker.sh's commands
  quote bash dynamo_jax/worker.sh "${@:3}"
  ssh_to "$1" "$2" "$QUOTED"
}

# describe queued-resources|tpu-vm FIELD: STATE is its state, or NONE.
describe() {
  local status=0
  tpu "$call_timeout" "$1" describe "$name" "--format=value($2)" || status=$?
  case $status in
    0) STATE=${OUT:-UNSPECIFIED} ;;
    4) STATE=NONE ;;
    *) out_of_reach ;;
  esac
  if [[ $dry ]]; then
    STATE=$dry_queue
    [[ $1 != tpu-vm ]] || STATE=READY
  fi
}

# slice: STATE is what there is to do with the slice. READY; NONE; DEAD: only to be deleted; WAIT: nothing yet.
slice() {
  local node=
  describe queued-resources state.state
  queue=$STATE
  case $queue in
    NONE) ;;
    SUSPENDED | FAILED) STATE=DEAD ;;
    ACTIVE)
      describe tpu-vm state
      node=$STATE
      case $node in
        READY) ;;
        NONE | PREEMPTED | TERMINATED | STOPPED | UNKNOWN) STATE=DEAD ;;
        *) STATE=WAIT ;; # CREATING, STARTING, RESTARTING, REPAIRING, STOPPING, DELETING, ...
      esac ;;
    *) STATE=WAIT ;; # WAITING_FOR_RESOURCES, ACCEPTED, CREATING, PROVISIONING, SUSPENDING, DELETING
  esac
  if [[ $queue/$node != "$seen" ]]; then
    seen=$queue/$node
    log "slice $name: queued resource $queue${node:+, node $node}"
  fi
}

create() {
  local flags=("--node-id=$name" "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version" --async)
  local status=0
  [[ $capacity == on-demand ]] || flags+=("--$capacity") # on demand is what gcloud does without a flag
  [[ -z $valid_until_duration ]] || flags+=("--valid-until-duration=$valid_until_duration")
  log "requesting $accelerator_type ($capacity) as $name in $zone"
  remind=1
  tpu "$call_timeout" queued-resources create "$name" "${flags[@]}" "${create_flags[@]}" || status=$?
  ((status != 5)) || out_of_reach
  ((status != 4)) || fail 1 "gcloud: $(tail -c 2000 "$tmp/err")"
  dry_queue=ACTIVE
}

remove() {
  local status=0 start=$SECONDS
  log "deleting slice $name"
  if [[ $queue != DELETING ]]; then
    tpu "$call_timeout" queued-resources delete "$name" --force --async || status=$?
    ((status != 5)) || out_of_reach
  fi
  dry_queue=NONE
  while slice && [[ $STATE != NONE ]]; do
    ((SECONDS - start < 1800)) || fail 75 "slice $name is still not deleted after half an hour; it may cost money"
    nap "$poll"
  done
  remind=
}

wait_ready() {
  while slice && [[ $STATE != READY ]]; do
    [[ $STATE != NONE ]] || fail 1 "there is no slice $name in $zone: create it first"
    [[ $STATE != DEAD ]] || fail 1 "slice $name is $queue and will not come back: delete it and create it again"
    nap "$poll"
  done
}

# Returns call's statuses.
install() {
  local archive=$tmp/dynamo_jax.tar.gz extract
  [[ -z $dry ]] || archive=${TMPDIR:-/tmp}/dynamo_jax.tar.gz
  [[ -z $(git -C "$root" status --porcelain) ]] ||
    log "warning: the checkout has uncommitted changes, which the workers do not get (they get commit ${commit:0:12})"
  log "installing commit ${commit:0:12} on all hosts of $name (minutes the first time)"
  if show git -C "$root" archive --format=tar.gz --output="$archive" "$commit"; then
    git -C "$root" archive --format=tar.gz --output="$archive" "$commit"
  fi
  tpu "$setup_timeout" tpu-vm scp "$archive" "$name:dynamo_jax.tar.gz" --worker=all "${connect_flags[@]}" || return
  extract='mkdir -p dynamo_jax && tar -xzOf dynamo_jax.tar.gz launch/worker.sh >dynamo_jax/worker.sh.new'
  quote bash dynamo_jax/worker.sh setup "$stamp" "${data:--}" "${models:--}" ${again:+again}
  ssh_to "$setup_timeout" all "$extract && mv dynamo_jax/worker.sh.new dynamo_jax/worker.sh && $QUOTED"
}

# look: what the hosts do. HOSTS, RUNNING: how many; INSTALLED: whether all have this commit, data and models;
# ENDS: the words for the others; OTHER: a run of another name that is going. Returns call's statuses.
# shellcheck disable=SC2034 # read by tpu_vm.sh
look() {
  local mark host has its_run state
  HOSTS=0 RUNNING=0 INSTALLED=1 ENDS=() OTHER='' REPORT=''
  # shellcheck disable=SC2016 # for the host to expand
  ssh_to "$call_timeout" all 'if [ -f dynamo_jax/worker.sh ]; then bash dynamo_jax/worker.sh state; '\
'else echo "DYNAMO_JAX $(hostname) - - none"; fi' || return
  [[ -z $dry ]] || OUT=$dry_host
  while read -r mark host has its_run state; do
    [[ $mark == DYNAMO_JAX && $state =~ ^(none|running|gone|exit:[0-9]+|stopped:[0-9]+)$ ]] || continue
    HOSTS=$((HOSTS + 1)) REPORT+="$host: $its_run $state"$'\n'
    [[ $has == "$stamp" ]] || INSTALLED=
    if [[ $state == running ]]; then
      RUNNING=$((RUNNING + 1))
      [[ $its_run == "$run" ]] || OTHER=$its_run
    else
      ENDS+=("$state")
    fi
  done <<<"$OUT"
}

start() {
  log "starting run $run on all hosts ($run_dir)"
  remote "$call_timeout" all start "$run" "$config" "${overrides[@]}" || return
  dry_host="DYNAMO_JAX - $stamp $run running" dry_run_state=complete
}

# RUN_STATE, STEP, STEPS: what status.json in the run folder says, wherever the slice is. AT: the step in words; until
# there is such a file none is known.
# shellcheck disable=SC2034 # read by tpu_vm.sh
read_status() {
  local status=0
  RUN_STATE=none STEP=-1 STEPS='' AT='an unknown step'
  call "$call_timeout" storage cat "$run_dir/status.json" --quiet || status=$?
  ((status != 5)) || out_of_reach
  [[ ! $OUT =~ \"state\"[[:space:]]*:[[:space:]]*\"([a-z]+)\" ]] || RUN_STATE=${BASH_REMATCH[1]}
  [[ ! $OUT =~ \"step\"[[:space:]]*:[[:space:]]*([0-9]+) ]] || STEP=${BASH_REMATCH[1]}
  [[ ! $OUT =~ \"steps\"[[:space:]]*:[[:space:]]*([0-9]+) ]] || STEPS=${BASH_REMATCH[1]}
  ((STEP < 0)) || AT="step $STEP"
  [[ -z $dry ]] || RUN_STATE=$dry_run_state
}
