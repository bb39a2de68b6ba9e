#!/usr/bin/env bash
# A run on GKE: a JobSet with one Job a slice and one pod a host.
#
#   gke.sh train  --name=NAME --image=IMAGE --type=v5litepod-16 [--slices=2] [--spot] -- --config=...
#   gke.sh doctor --name=NAME --image=IMAGE --type=v5litepod-16 -- --config=... --workdir=gs://...
#   gke.sh logs | status | stop  --name=NAME
#   gke.sh xpk    ... -- ...    the same run through xpk, for clusters that xpk made
#
# Options: --namespace=NAMESPACE (default)   --service_account=NAME (of Kubernetes, for the bucket)
#          --max_restarts=100   --grace_seconds=120 (from SIGTERM to SIGKILL)
#          --cluster=NAME --zone=ZONE --project=PROJECT (xpk)
#          --dry_run: print the JobSet or the command
#
# Needs kubectl with the cluster's credentials, and JobSet 0.8 or newer on the cluster. The image comes
# from the Dockerfile beside this file. See docs/guides/pods.md.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/launch/common.sh
source "$here/common.sh"

case ${1:-} in -h | --help | help) show_help ;; esac
action=${1:-}
[[ $# -gt 0 ]] && shift
name='' image='' type='' slices=1 spot='' namespace=default service_account=''
max_restarts=100 grace_seconds=120 cluster='' zone='' project=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --namespace=*) namespace=${1#*=} ;;
    --service_account=*) service_account=${1#*=} ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --grace_seconds=*) grace_seconds=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
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
  train | doctor | xpk | logs | status | stop) ;;
  '') fail 'name an action: train, doctor, logs, status, stop or xpk' ;;
  *) fail "no action '$action'; there are train, doctor, logs, status, stop, xpk" ;;
esac
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "--name=$name must be lower-case letters, digits and hyphens, 40 at most, a letter first"
case $action in
  train | doctor | xpk)
    [[ -n $image ]] || fail '--image=IMAGE is missing: docker build -t IMAGE -f tools/launch/Dockerfile .'
    [[ -n $type ]] || fail '--type=TYPE is missing, for example --type=v5litepod-16'
    [[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices must be a whole number above 0"
    [[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max_restarts=$max_restarts must be a whole number"
    [[ $grace_seconds =~ ^[0-9]+$ ]] || fail "--grace_seconds=$grace_seconds must be a whole number"
    [[ $# -gt 0 ]] || fail "pass the arguments of dist_jax after --: gke.sh $action ... -- --config=..."
    find_slice "$type"
    for argument in "$@"; do
      if [[ $argument == --workdir=* && $argument != --workdir=*://* ]]; then
        fail "$argument is a folder of the container, gone with it; use a bucket (gs://...)"
      fi
    done
    ;;
esac

# A word as a JSON string, which YAML reads too.
json() {
  local word=$1
  word=${word//\\/\\\\}
  word=${word//\"/\\\"}
  printf '"%s"' "${word//$'\n'/\\n}"
}

command_line() {
  local word line
  line=$(json "$1")
  for word in "${@:2}"; do
    line+=", $(json "$word")"
  done
  printf '[%s]' "$line"
}

jobset() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  namespace: $namespace
  annotations:
    # One Job, which is one slice, a node pool.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    # A pod that fails ends its Job, and with it all pods of all slices, which then start again.
    maxRestarts: $max_restarts
    rules:
      - name: wrongarguments
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              # Wrong arguments or config would be wrong again. Not 74, a full disk: the next pod
              # may have room. Exit codes: docs/guides/runs.md.
              - action: FailJob
                onExitCodes:
                  containerName: dist-jax
                  operator: In
                  values: [2]
          template:
            spec:
              restartPolicy: Never
              hostNetwork: true # slices talk to each other through the hosts
              dnsPolicy: ClusterFirstWithHostNet
              terminationGracePeriodSeconds: $grace_seconds # for the last checkpoint
YAML
  if [[ -n $service_account ]]; then
    printf '              serviceAccountName: %s\n' "$service_account"
  fi
  cat <<YAML
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $gke_label
                cloud.google.com/gke-tpu-topology: $topology
YAML
  if [[ -n $spot ]]; then
    cat <<'YAML'
                cloud.google.com/gke-spot: "true"
              tolerations:
                - key: cloud.google.com/gke-spot
                  operator: Equal
                  value: "true"
                  effect: NoSchedule
YAML
  fi
  cat <<YAML
              containers:
                - name: dist-jax
                  image: $image
                  # dist_jax itself is the first process: it gets the SIGTERM of a preemption.
                  command: $(command_line "$@")
                  ports:
                    - containerPort: 8471 # libtpu
                    - containerPort: 8080 # between slices
                    - containerPort: 8482 # jax's coordinator
                  resources:
                    limits:
                      google.com/tpu: $chips_a_host
                  volumeMounts:
                    - name: shared-memory
                      mountPath: /dev/shm
              volumes:
                - name: shared-memory
                  emptyDir:
                    medium: Memory
YAML
}

submit() {
  if [[ -n $dry_run ]]; then
    jobset "$@"
  else
    jobset "$@" | kubectl apply -f -
    printf 'gke.sh: %s: %d x %s (%s), %d chips on %d hosts\n' \
      "$name" "$slices" "$type" "$topology" "$((chips * slices))" "$((hosts * slices))" >&2
  fi
}

case $action in
  train) submit dist_jax train "$@" ;;
  doctor)
    max_restarts=0
    name=$name-doctor
    submit dist_jax doctor --devices="$((chips * slices))" "$@"
    ;;
  logs) # of the first host of the first slice
    run kubectl logs -n "$namespace" -f --tail=100 \
      -l "jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ;;
  status)
    run kubectl get jobset "$name" -n "$namespace" -o wide
    run kubectl get pods -n "$namespace" -l "jobset.sigs.k8s.io/jobset-name=$name" -o wide
    ;;
  stop) # saves first: Kubernetes sends SIGTERM
    run kubectl delete jobset "$name" -n "$namespace"
    ;;
  xpk)
    [[ -n $cluster ]] || fail '--cluster=NAME is missing'
    run xpk workload create --cluster="$cluster" ${zone:+--zone="$zone"} \
      ${project:+--project="$project"} --workload="$name" --docker-image="$image" \
      --tpu-type="$type" --num-slices="$slices" --max-restarts="$max_restarts" \
      --command="$(quoted dist_jax train "$@")"
    ;;
esac
