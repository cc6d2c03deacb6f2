# shellcheck shell=bash
# What the scripts of this folder share: flags, and commands that are printed before they are run, or only printed.
# To be sourced by a script whose leading comment is its help.
# shellcheck disable=SC2034 # what is set here is read there

set -euo pipefail

NAME="" ZONE="" PROJECT="" TYPE="" RUNTIME="" BUCKET="" ACCOUNT="" SPOT=0 DRY_RUN=0 TENSORBOARD=0 RETRIES=3 EVERY=60
REST=() # what stands behind --

fail() { # MESSAGE: end with it
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# usage: the leading comment of the script that sources this.
usage() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"; }

# parse WANTED ARGUMENT...: set the variables above from flags. WANTED: those that must be given, with spaces.
parse() {
  local wanted=$1 flag variable
  shift
  while (($#)); do
    case $1 in
      --name=*) NAME=${1#*=} ;;
      --zone=*) ZONE=${1#*=} ;;
      --project=*) PROJECT=${1#*=} ;;
      --type=*) TYPE=${1#*=} ;;
      --runtime=*) RUNTIME=${1#*=} ;;
      --bucket=*) BUCKET=${1#*=} ;;
      --account=*) ACCOUNT=${1#*=} ;;
      --retries=*) RETRIES=${1#*=} ;;
      --every=*) EVERY=${1#*=} ;;
      --spot) SPOT=1 ;;
      --tensorboard) TENSORBOARD=1 ;;
      --dry-run) DRY_RUN=1 ;;
      --help) usage && exit 0 ;;
      --) shift && REST=("$@") && break ;;
      *) fail "unknown argument $1: see $0 --help" ;;
    esac
    shift
  done
  for flag in $wanted; do
    variable=${flag^^}
    [[ -n ${!variable} ]] || fail "--$flag is missing: see $0 --help"
  done
  # Names go into commands on other machines and into other names: what Google allows, and nothing else.
  [[ -z $NAME || $NAME =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    fail "--name=$NAME must be lower-case letters, digits and hyphens, a letter first"
  [[ -z $ZONE || $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone=$ZONE is no zone, such as us-west4-a"
  [[ -z $PROJECT || $PROJECT =~ ^[a-z0-9:.-]+$ ]] || fail "--project=$PROJECT is no project's id"
  [[ -z $TYPE || $TYPE =~ ^v[0-9]+[a-z]*-[0-9]+$ ]] || fail "--type=$TYPE is no accelerator type, such as v5litepod-16"
  [[ -z $BUCKET || $BUCKET =~ ^gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/[A-Za-z0-9._/-]+)?$ ]] ||
    fail "--bucket=$BUCKET must be gs://BUCKET or a folder in it"
  [[ $RETRIES =~ ^[0-9]+$ && $EVERY =~ ^[0-9]+$ ]] || fail "--retries and --every are whole numbers"
  RETRIES=$((10#$RETRIES)) # 08 is no octal number
}

# shown COMMAND...: run it; with --dry-run print it instead, as a line that a shell reads.
shown() {
  if ((DRY_RUN)); then
    quoted "$@"
  else
    "$@"
  fi
}

quoted() { # WORD...: as a line that a shell reads back
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

place() { # the flags that say where, into the array WHERE
  WHERE=("--zone=$ZONE")
  [[ -z $PROJECT ]] || WHERE+=("--project=$PROJECT")
}

# runtime TYPE: the software that VMs of an accelerator type start with.
runtime() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "no runtime is known for --type=$1: give --runtime=VERSION (gcloud compute tpus tpu-vm versions list)" ;;
  esac
}

# on WORKER COMMAND [SSH_ARGUMENT...]: run a shell command on a worker, or on all.
on() {
  local worker=$1 command=$2
  shift 2
  place
  local extra=()
  (($# == 0)) || extra=(-- "$@")
  shown gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" "--worker=$worker" --quiet "--command=$command" "${extra[@]}"
}

# What a worker runs before anything is changed there: TPUs and their code belong to one run at a time.
IDLE="if pgrep -f '[s]pjax\\.main' >/dev/null; then echo 'a run is going on: watch it, or stop it' >&2; exit 1; fi"

# state: of the queued resource; nothing where there is none. A gcloud that does not answer is an error, and not nothing.
state() {
  place
  shown gcloud compute tpus queued-resources list "${WHERE[@]}" "--filter=name~\"/$NAME\$\"" "--format=value(state.state)"
}

# workdir: the value of --workdir in REST.
workdir() {
  local word found=""
  for word in "${REST[@]}"; do
    [[ $word != --workdir=* ]] || found=${word#*=}
  done
  [[ $found == gs://?*/?* ]] ||
    fail "--workdir=$found must be a folder on gs://, behind -- and with =: what lies on a TPU VM goes when it goes"
  printf '%s\n' "${found%/}"
}
