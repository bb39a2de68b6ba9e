# shellcheck shell=bash
# For tpu_vm.sh and gke.sh: the table of slices, and commands that a dry run only prints.

# type              topology  chips  chips a host  label of GKE           runtime of a TPU VM
SLICES='
v4-8                2x2x1     4      4             tpu-v4-podslice        tpu-ubuntu2204-base
v4-16               2x2x2     8      4             tpu-v4-podslice        tpu-ubuntu2204-base
v4-32               2x2x4     16     4             tpu-v4-podslice        tpu-ubuntu2204-base
v4-64               2x4x4     32     4             tpu-v4-podslice        tpu-ubuntu2204-base
v4-128              4x4x4     64     4             tpu-v4-podslice        tpu-ubuntu2204-base
v4-256              4x4x8     128    4             tpu-v4-podslice        tpu-ubuntu2204-base
v4-512              4x8x8     256    4             tpu-v4-podslice        tpu-ubuntu2204-base
v5litepod-4         2x2       4      4             tpu-v5-lite-podslice   v2-alpha-tpuv5-lite
v5litepod-8         2x4       8      8             tpu-v5-lite-podslice   v2-alpha-tpuv5-lite
v5litepod-16        4x4       16     4             tpu-v5-lite-podslice   v2-alpha-tpuv5-lite
v5litepod-32        4x8       32     4             tpu-v5-lite-podslice   v2-alpha-tpuv5-lite
v5litepod-64        8x8       64     4             tpu-v5-lite-podslice   v2-alpha-tpuv5-lite
v5litepod-128       8x16      128    4             tpu-v5-lite-podslice   v2-alpha-tpuv5-lite
v5litepod-256       16x16     256    4             tpu-v5-lite-podslice   v2-alpha-tpuv5-lite
v5p-8               2x2x1     4      4             tpu-v5p-slice          v2-alpha-tpuv5
v5p-16              2x2x2     8      4             tpu-v5p-slice          v2-alpha-tpuv5
v5p-32              2x2x4     16     4             tpu-v5p-slice          v2-alpha-tpuv5
v5p-64              2x4x4     32     4             tpu-v5p-slice          v2-alpha-tpuv5
v5p-128             4x4x4     64     4             tpu-v5p-slice          v2-alpha-tpuv5
v5p-256             4x4x8     128    4             tpu-v5p-slice          v2-alpha-tpuv5
v5p-512             4x8x8     256    4             tpu-v5p-slice          v2-alpha-tpuv5
v6e-4               2x2       4      4             tpu-v6e-slice          v2-alpha-tpuv6e
v6e-8               2x4       8      8             tpu-v6e-slice          v2-alpha-tpuv6e
v6e-16              4x4       16     4             tpu-v6e-slice          v2-alpha-tpuv6e
v6e-32              4x8       32     4             tpu-v6e-slice          v2-alpha-tpuv6e
v6e-64              8x8       64     4             tpu-v6e-slice          v2-alpha-tpuv6e
v6e-128             8x16      128    4             tpu-v6e-slice          v2-alpha-tpuv6e
v6e-256             16x16     256    4             tpu-v6e-slice          v2-alpha-tpuv6e
'

dry_run=''

fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

# Prints a command so that it can be pasted into a shell.
show() {
  local word line=''
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]]; then
      line+=" $word"
    else
      line+=" '${word//\'/\'\\\'\'}'"
    fi
  done
  printf '%s\n' "${line# }"
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ -n $dry_run ]]; then
    show "$@"
  else
    "$@"
  fi
}

# Words as one line that a shell reads back as the same words.
quoted() {
  local line
  line=$(printf ' %q' "$@")
  printf '%s' "${line# }"
}

# Sets topology, chips, chips_a_host, hosts, gke_label and default_runtime of a slice type.
find_slice() {
  local name
  while read -r name topology chips chips_a_host gke_label default_runtime; do
    if [[ $name == "$1" ]]; then
      hosts=$((chips / chips_a_host))
      return
    fi
  done <<<"$SLICES"
  fail "--type=$1 is not one of: $(awk 'NF {printf "%s ", $1}' <<<"$SLICES")"
}

# Prints the comment at the head of the script, which is its help, and ends.
show_help() {
  sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"
  exit 0
}
