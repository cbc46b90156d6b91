#!/usr/bin/env bash
# Builds, launches, watches and cancels earmark on Google Cloud. Each command is shown before it runs.
#
#   deploy/deploy.sh image                    build and push the image (Cloud Build)
#   deploy/deploy.sh template                 write the Flex Template's specification
#   deploy/deploy.sh run INPUT... [OPTION...] launch from here: `earmark annotate`; options win over the settings
#   deploy/deploy.sh run-template INPUT... [NAME=VALUE...] [--GCLOUD-FLAG=VALUE...]
#                                             launch from the template: no Python needed here
#   deploy/deploy.sh jobs                     the jobs of this region
#   deploy/deploy.sh watch JOB_ID             state until it ends, then its errors; exit code 1 unless DONE
#   deploy/deploy.sh cancel JOB_ID            stop it; finished shards stay
#
# Settings are environment variables:
#   PROJECT   the Google Cloud project                                  (required)
#   REGION    where data, image and workers are                         (required)
#   BUCKET    gs://... of the output and of staged files                (required by image, template, run*)
#   OUTPUT    gs://... of the tags                                      (default: BUCKET/tags)
#   GPU       nvidia-l4, nvidia-tesla-t4, ... or none                   (default: nvidia-l4)
#   CHECKPOINT                                                          (default: bookbot/distil-ast-audioset)
#   DRY_RUN=1 shows the commands and runs none
set -euo pipefail

cd "$(dirname "$0")/.."

VERSION=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
BEAM=$(sed -n 's/^apache-beam==//p' constraints.txt)
TAG="${VERSION}-py3.11-beam${BEAM}"
CHECKPOINT="${CHECKPOINT:-bookbot/distil-ast-audioset}"
GPU="${GPU:-nvidia-l4}"
POLL_S=30

fail() {
  printf 'deploy.sh: %s\n' "$1" >&2
  exit 2
}

need() {
  local name
  for name in "$@"; do
    [[ -n "${!name:-}" ]] || fail "set ${name}, for instance: export ${name}=..."
  done
}

# Shows a command as it could be typed, and runs it unless DRY_RUN is set.
run() {
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  [[ -n "${DRY_RUN:-}" ]] || "$@"
}

bucket() {
  need BUCKET
  [[ "$BUCKET" == gs://* ]] || fail "BUCKET is '${BUCKET}', expected gs://..."
  printf '%s' "${BUCKET%/}"
}

image_name() { printf '%s-docker.pkg.dev/%s/earmark/earmark:%s' "$REGION" "$PROJECT" "$TAG"; }

worker() { printf 'earmark-worker@%s.iam.gserviceaccount.com' "$PROJECT"; }

image() {
  local home
  home=$(bucket)
  run gcloud builds submit . --project "$PROJECT" --region "$REGION" --config deploy/cloudbuild.yaml \
    --gcs-source-staging-dir "${home}/build" \
    --substitutions "_REGION=${REGION},_TAG=${TAG},_CHECKPOINT=${CHECKPOINT}"
}

template() {
  local home
  home=$(bucket)
  run gcloud dataflow flex-template build "${home}/templates/earmark-${TAG}.json" --project "$PROJECT" \
    --image "$(image_name)" --sdk-language PYTHON --metadata-file deploy/metadata.json
}

launch() {
  [[ $# -gt 0 ]] || fail "run needs an INPUT, such as gs://my-audio/shards/*.tar"
  local home
  home=$(bucket)
  # What is given comes last, and wins over the settings.
  run earmark annotate --output "${OUTPUT:-${home}/tags}" --checkpoint "$CHECKPOINT" \
    --runner DataflowRunner --project "$PROJECT" --region "$REGION" --gpu "$GPU" \
    --service_account_email "$(worker)" "$@"
}

launch_template() {
  local home quoted inputs=() flags=() parameters argument
  home=$(bucket)
  parameters="output=${OUTPUT:-${home}/tags}~checkpoint=${CHECKPOINT}~gpu=${GPU}"
  for argument in "$@"; do
    case "$argument" in
      *~*) fail "'${argument}' holds a '~', which parts the parameters here; call gcloud yourself" ;;
      --*) flags+=("$argument") ;;
      gs://*) inputs+=("$argument") ;;
      *=*) parameters+="~${argument}" ;;
      *) fail "'${argument}' is neither a gs:// input nor NAME=VALUE" ;;
    esac
  done
  [[ ${#inputs[@]} -gt 0 ]] || fail "run-template needs an INPUT, such as gs://my-audio/shards/*.tar"
  printf -v quoted '%q ' "${inputs[@]}" # the template parts its inputs as a shell does
  # ^~^ makes ~ the separator: inputs and patterns may hold commas.
  run gcloud dataflow flex-template run "earmark-$(date +%Y%m%d-%H%M%S)" --project "$PROJECT" --region "$REGION" \
    --template-file-gcs-location "${home}/templates/earmark-${TAG}.json" \
    --service-account-email "$(worker)" \
    --staging-location "${home}/staging" --temp-location "${home}/temp" "${flags[@]}" \
    --parameters "^~^inputs=${quoted% }~${parameters}"
}

jobs_of_region() {
  run gcloud dataflow jobs list --project "$PROJECT" --region "$REGION" --limit 20
}

watch() {
  [[ $# -eq 1 ]] || fail "watch needs a JOB_ID (deploy/deploy.sh jobs)"
  local state=""
  while :; do
    state=$(run gcloud dataflow jobs describe "$1" --project "$PROJECT" --region "$REGION" \
      --format 'value(currentState)')
    [[ -z "${DRY_RUN:-}" ]] || break
    printf '%s %s\n' "$(date +%T)" "$state"
    case "$state" in
      JOB_STATE_DONE | JOB_STATE_FAILED | JOB_STATE_CANCELLED | JOB_STATE_UPDATED | JOB_STATE_DRAINED) break ;;
    esac
    sleep "$POLL_S"
  done
  run gcloud logging read \
    "resource.type=dataflow_step AND resource.labels.job_id=$1 AND severity>=ERROR" \
    --project "$PROJECT" --limit 10 --freshness 7d --format 'value(timestamp,jsonPayload.message)'
  [[ -n "${DRY_RUN:-}" || "$state" == JOB_STATE_DONE ]]
}

cancel() {
  [[ $# -eq 1 ]] || fail "cancel needs a JOB_ID (deploy/deploy.sh jobs)"
  run gcloud dataflow jobs cancel "$1" --project "$PROJECT" --region "$REGION"
}

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "$0"; }

target="${1:-help}"
[[ $# -eq 0 ]] || shift
case "$target" in
  -h | --help | help) usage; exit 0 ;;
  image | template | run | run-template | jobs | watch | cancel) need PROJECT REGION ;;
  *) fail "there is no target '${target}'; deploy/deploy.sh help lists them" ;;
esac
case "$target" in
  image) image ;;
  template) template ;;
  run) launch "$@" ;;
  run-template) launch_template "$@" ;;
  jobs) jobs_of_region ;;
  watch) watch "$@" ;;
  cancel) cancel "$@" ;;
esac
