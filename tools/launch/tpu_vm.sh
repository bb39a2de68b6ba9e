#!/usr/bin/env bash
# A run on TPU VMs: one slice or several, on demand or spot, through queued resources.
#
#   tpu_vm.sh create --name=NAME --zone=ZONE --type=v4-32 [--slices=2] [--spot]
#   tpu_vm.sh setup  --name=NAME --zone=ZONE --type=v4-32        this checkout, on all workers
#   tpu_vm.sh doctor --name=NAME --zone=ZONE --type=v4-32 -- --config=... --workdir=gs://...
#   tpu_vm.sh train  --name=NAME --zone=ZONE --type=v4-32 -- --config=... --workdir=gs://...
#   tpu_vm.sh logs | status | stop | delete  --name=NAME --zone=ZONE --type=v4-32
#   tpu_vm.sh keep   ... -- ...     all of it: creates, trains, and after a preemption again
#
# Options: --project=PROJECT   --runtime=VERSION (default: of the type)   --worker=N (logs; 0)
#          --valid_for=6h (create: give up waiting for capacity)   --poll_seconds=60 (keep)
#          --dry_run: print the commands instead of running them
#
# The same command runs on every worker, by worker.sh, detached from the connection; its output is in
# ~/dist_jax.log there. Needs gcloud. See docs/guides/pods.md.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source=tools/launch/common.sh
source "$here/common.sh"

case ${1:-} in -h | --help | help) show_help ;; esac
action=${1:-}
[[ $# -gt 0 ]] && shift
name='' zone='' project='' type='' slices=1 runtime='' spot='' worker=0 valid_for='' poll_seconds=60
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --valid_for=*) valid_for=${1#*=} ;;
    --poll_seconds=*) poll_seconds=${1#*=} ;;
    --spot) spot=1 ;;
    --dry_run) dry_run=1 ;;
    --)
      shift
      break
      ;;
    *) fail "unknown option $1; --help shows all" ;;
  esac
  shift
done

case $action in
  create | setup | doctor | train | logs | status | stop | delete | keep) ;;
  '') fail 'name an action: create, setup, doctor, train, logs, status, stop, delete or keep' ;;
  *) fail "no action '$action'; there are create, setup, doctor, train, logs, status, stop, delete, keep" ;;
esac
[[ -n $name ]] || fail '--name=NAME is missing'
[[ -n $zone ]] || fail '--zone=ZONE is missing, for example --zone=us-central2-b'
[[ -n $type ]] || fail '--type=TYPE is missing, for example --type=v4-32'
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices must be a whole number above 0"
find_slice "$type"
case $action in
  train | keep) [[ $# -gt 0 ]] || fail "pass the arguments of dist_jax after --: tpu_vm.sh $action ... -- --config=..." ;;
esac
for argument in "$@"; do
  # A folder on a worker is not one that the others see.
  if [[ $argument == --workdir=* && $argument != --workdir=*://* && $((hosts * slices)) -gt 1 ]]; then
    printf 'tpu_vm.sh: %s must be on a disk that all %d workers share; otherwise use gs://\n' \
      "$argument" "$((hosts * slices))" >&2
  fi
done

place=(--zone="$zone" ${project:+--project="$project"})
nodes=("$name")
if ((slices > 1)); then # as --node-prefix names them
  nodes=()
  for ((i = 0; i < slices; i++)); do
    nodes+=("$name-$i")
  done
fi

# Runs a line on every worker of every slice, on all slices at the same time.
on_all() {
  local node code=0 started=()
  for node in "${nodes[@]}"; do
    if [[ -n $dry_run ]]; then
      run gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$1"
    else
      gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$1" &
      started+=("$!")
    fi
  done
  for node in ${started[@]+"${started[@]}"}; do
    wait "$node" || code=$?
  done
  return "$code"
}

state() {
  if [[ -n $dry_run ]]; then
    printf 'ACTIVE\n'
  else
    gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
      --format='value(state.state)' 2>/dev/null || printf 'NONE\n'
  fi
}

create() {
  local which=(--node-id="$name")
  ((slices > 1)) && which=(--node-count="$slices" --node-prefix="$name")
  run gcloud compute tpus queued-resources create "$name" "${place[@]}" \
    --accelerator-type="$type" --runtime-version="${runtime:-$default_runtime}" "${which[@]}" \
    ${spot:+--spot} ${valid_for:+--valid-until-duration="$valid_for"}
  local now before=''
  while now=$(state) && [[ $now != ACTIVE ]]; do
    [[ $now != "$before" ]] && printf 'tpu_vm.sh: %s is %s\n' "$name" "$now" >&2
    before=$now
    case $now in
      FAILED | SUSPENDED | SUSPENDING | NONE)
        printf 'tpu_vm.sh: %s is %s; see: gcloud compute tpus queued-resources describe %s %s\n' \
          "$name" "$now" "$name" "${place[*]}" >&2
        return 1
        ;;
    esac
    sleep "$poll_seconds"
  done
  printf 'tpu_vm.sh: %s: %d x %s (%s), %d chips on %d hosts\n' \
    "$name" "$slices" "$type" "$topology" "$((chips * slices))" "$((hosts * slices))" >&2
}

setup() {
  local node folder=/tmp archive
  [[ -z $dry_run ]] && folder=$(mktemp -d)
  archive=$folder/dist_jax.tar.gz
  # What is committed, and nothing else.
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:dist_jax.tar.gz" "${place[@]}" --worker=all
  done
  [[ -z $dry_run ]] && rm -r "$folder"
  # The images have Python 3.10; uv brings another.
  on_all 'set -e; rm -rf dist_jax; mkdir dist_jax; tar xzf dist_jax.tar.gz -C dist_jax; python3 -m pip install --user --quiet uv; python3 -m uv venv --quiet --allow-existing --python=3.11 .venv; python3 -m uv pip install --quiet --python=.venv/bin/python "./dist_jax[tpu]"'
}

doctor() {
  on_all "cd dist_jax && $(quoted ../.venv/bin/dist_jax doctor --devices="$((chips * slices))" "$@")"
}

train() {
  local line
  line=$(quoted bash tools/launch/worker.sh -- ../.venv/bin/dist_jax train "$@")
  # Not started twice: two processes cannot hold the same chips.
  on_all "cd dist_jax && if kill -0 \"\$(cat ~/dist_jax.pid 2>/dev/null)\" 2>/dev/null; then echo 'it runs already: tpu_vm.sh stop' >&2; exit 1; fi; DIST_JAX_PID_FILE=~/dist_jax.pid setsid nohup $line >>~/dist_jax.log 2>&1 </dev/null & sleep 1"
}

case $action in
  create) create ;;
  setup) setup ;;
  doctor) doctor "$@" ;;
  train) train "$@" ;;
  logs)
    run gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" --worker="$worker" \
      --command='tail -n 100 -F dist_jax.log'
    ;;
  status)
    run gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)'
    on_all 'echo "$(hostname): $(tail -n 1 dist_jax.log 2>/dev/null)"'
    ;;
  stop) # saves first
    on_all 'kill -TERM "$(cat ~/dist_jax.pid)"'
    ;;
  delete)
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
    ;;
  keep)
    # Every worker: 'running', or the last line of its log.
    probe='kill -0 "$(cat ~/dist_jax.pid)" 2>/dev/null && echo running || tail -n 1 ~/dist_jax.log'
    while :; do
      now=$(state)
      if [[ -n $dry_run || $now == NONE ]]; then
        create
        setup
        train "$@"
        [[ -n $dry_run ]] && break
      elif [[ $now == SUSPENDED || $now == FAILED ]]; then
        printf 'tpu_vm.sh: %s is %s: made again\n' "$name" "$now" >&2
        gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
        continue
      elif [[ $now == ACTIVE ]] && found=$(on_all "$probe" 2>/dev/null); then
        if grep -q 'not started again' <<<"$found"; then
          printf 'tpu_vm.sh: the run gave up; see tpu_vm.sh logs\n%s\n' "$found" >&2
          exit 1
        elif ! grep -qv 'worker.sh: done' <<<"$found"; then
          printf 'tpu_vm.sh: the run is done; tpu_vm.sh delete frees the TPUs\n' >&2
          exit 0
        elif grep -qv -e running -e 'worker.sh: done' <<<"$found"; then
          printf 'tpu_vm.sh: not all workers run; started again\n' >&2
          train "$@" || true # those that run refuse
        fi
      fi
      sleep "$poll_seconds"
    done
    ;;
esac
