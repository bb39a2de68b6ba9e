#!/usr/bin/env bash
# Runs a command on this worker until it is done, and starts it again when it was interrupted.
#
#   worker.sh -- dist_jax train --config=... --workdir=gs://bucket/run ...
#
# tpu_vm.sh starts it on every worker. On GKE the JobSet does this work.
#
# Exit codes of dist_jax, and what happens here:
#   0    at the end                                    stop
#   2    wrong arguments or config                     stop: it would be wrong again
#   75   interrupted (SIGTERM, a lost process, a       start again
#        workdir in use)
#   1    an error                                      start again, at most 3 times in a row
#   74   a disk is full                                start again, at most 3 times in a row
#   134  ended by jax: another process was lost        start again
#   143  SIGTERM while Python itself was starting        start again
#   137  killed, perhaps for memory                    start again, at most 3 times in a row
#
# SIGTERM to this script is passed on to the command, which saves and ends; it is not started again.
# A preemption notice of Compute Engine is passed on in the same way; what comes after it is up to the
# machine, which goes away within 30 s.
set -euo pipefail

attempts=${DIST_JAX_ATTEMPTS:-100}       # starts in all
pause=${DIST_JAX_PAUSE_SECONDS:-30}      # between an end and the next start
poll=${DIST_JAX_NOTICE_SECONDS:-5}       # between looks for a preemption notice; 0: do not look
notice_url=http://metadata.google.internal/computeMetadata/v1/instance/preempted
failures_in_a_row=3

say() {
  printf '%s worker.sh: %s\n' "$(date -u +%FT%TZ)" "$*" >&2
}

[[ ${1:-} == -- ]] && shift
if [[ $# -eq 0 ]]; then
  say 'pass the command: worker.sh -- dist_jax train ...'
  exit 2
fi
[[ -n ${DIST_JAX_PID_FILE:-} ]] && printf '%s\n' "$$" >"$DIST_JAX_PID_FILE"

child=''
watcher=''
stopping=''

pass_on() {
  stopping=1
  say 'SIGTERM: the command saves and ends'
  [[ -n $child ]] && kill -TERM "$child" 2>/dev/null || true
}
trap pass_on TERM INT

# Looks for a preemption notice until the command ends.
watch_notice() {
  while sleep "$poll"; do
    if [[ $(curl -fs -m 2 -H 'Metadata-Flavor: Google' "$notice_url" 2>/dev/null) == TRUE ]]; then
      say 'this machine is preempted: the command saves and ends'
      kill -TERM "$1" 2>/dev/null
      return
    fi
  done
}

failed=0
for ((attempt = 1; attempt <= attempts; attempt++)); do
  say "start $attempt of at most $attempts: $*"
  "$@" &
  child=$!
  if [[ $poll != 0 ]]; then
    watch_notice "$child" &
    watcher=$!
  fi
  code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # the wait was interrupted by a signal to this script
    code=0
    wait "$child" || code=$?
  done
  child=''
  if [[ -n $watcher ]]; then
    kill "$watcher" 2>/dev/null || true
    wait "$watcher" 2>/dev/null || true
  fi

  case $code in
    0)
      say 'done'
      exit 0
      ;;
    2)
      say 'wrong arguments or config (exit code 2): not started again'
      exit 2
      ;;
    75) failed=0 reason='interrupted before the end' ;;
    74) failed=$((failed + 1)) reason='a disk is full' ;;
    134) failed=0 reason='ended by jax: another process was lost, or started again' ;;
    143) failed=0 reason='interrupted before it began' ;;
    137) failed=$((failed + 1)) reason='killed, perhaps for memory' ;;
    *) failed=$((failed + 1)) reason='an error' ;;
  esac
  say "exit code $code: $reason"
  if [[ -n $stopping ]]; then
    exit "$code"
  fi
  if ((failed >= failures_in_a_row)); then
    say "$failed failures in a row: not started again"
    exit "$code"
  fi
  if ((attempt < attempts)); then
    sleep "$pause" &
    wait "$!" || true # a SIGTERM ends the wait
    [[ -n $stopping ]] && exit 75
  fi
done
say "$attempts starts: not started again"
exit 75
