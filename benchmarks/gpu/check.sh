#!/usr/bin/env bash
# Proves and measures on a GPU, in at most eight minutes, what can be proved and measured nowhere else.
#   benchmarks/gpu/check.sh [--dry] [--out FOLDER] [--seconds N] [stage ...]
# --dry      drives every stage on the CPU with small sizes, and measures nothing
# --out      the folder of the results; by default $OUT, else a new one
# --seconds  after which no stage starts and none goes on; 480, with --dry 1440
# The stages are those named in `all`; each has a time limit, and only a failed build ends the others. What a stage finds
# is in FOLDER as soon as it is known: machine.json, stages.jsonl, tests.json, sweep.jsonl, sanitizer.json, timing.jsonl,
# profile.json, log.txt. The exit status is 0 if all stages ended well and nothing was found.
set -uo pipefail

all=(machine build tests sweep sanitizer timing profile)
declare -A limits=([machine]=60 [build]=240 [tests]=100 [sweep]=95 [sanitizer]=70 [timing]=125 [profile]=50)
declare -A files=([machine]=machine.json [tests]=tests.json [sweep]=sweep.jsonl [sanitizer]=sanitizer.json
  [timing]=timing.jsonl [profile]=profile.json)
device_lost=10 # exit status of sweep and benchmarks: what is left needs a new process

usage() {
  echo "usage: check.sh [--dry] [--out FOLDER] [--seconds N] [stage ...]; the stages are: ${all[*]}" >&2
  exit 2
}

dry=() folder=${OUT:-} total='' stages=()
while (($#)); do
  case $1 in
    --dry) dry=(--dry) ;;
    --out | --seconds)
      (($# > 1)) || { echo "check.sh: $1 needs a value" >&2; usage; }
      if [[ $1 == --out ]]; then folder=$2; else total=$2; fi
      shift
      ;;
    --help | -h) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *)
      [[ " ${all[*]} " == *" $1 "* ]] || { echo "check.sh: unknown stage or option '$1'" >&2; usage; }
      stages+=("$1")
      ;;
  esac
  shift
done
# Two busy cores without a GPU take longer, for less.
if ((${#dry[@]})); then
  for name in "${all[@]}"; do limits[$name]=$((3 * limits[$name])); done
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
total=${total:-$((${#dry[@]} ? 1440 : 480))}
[[ $total =~ ^[0-9]+$ ]] || { echo "check.sh: --seconds needs a whole number, got '$total'" >&2; usage; }
((${#stages[@]})) || stages=("${all[@]}")

folder=${folder:-$(mktemp -d "${TMPDIR:-/tmp}/lossmeta-gpu.XXXXXX")}
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2

python=${PYTHON:-python3}
# build/gpu-site: where the build installs if the environment's own folder cannot be written.
export PYTHONPATH=$PWD/benchmarks:$PWD/build/gpu-site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONUTF8=1 HYPOTHESIS_PROFILE=default

touch "$folder/stages.jsonl"
for name in "${stages[@]}"; do
  [[ -z ${files[$name]:-} ]] || rm -f "$folder/${files[$name]}"
  sed -i "/\"stage\": \"$name\"/d" "$folder/stages.jsonl"
done
[[ ${#stages[@]} -lt ${#all[@]} ]] || rm -f "$folder/log.txt"

exec > >(exec tee -a "$folder/log.txt") 2>&1
tee=$!
child=
# A signal stops the command that runs, with its children: timeout has a process group of its own.
trap '[[ -z $child ]] || kill -TERM "$child" 2> /dev/null; exit 130' INT TERM HUP

left() { echo $((total - SECONDS)); }

# limited SECONDS COMMAND...: its exit status, 124 or 137 if it was stopped.
limited() {
  local limit=$1 status
  shift
  (($(left) < limit)) && limit=$(left)
  ((limit > 0)) || return 124
  timeout --kill-after=5 "$limit" "$@" &
  child=$!
  wait "$child"
  status=$?
  child=
  return "$status"
}

# module LIMIT NAME ARGUMENTS...: one of this folder's modules.
module() {
  local limit=$1 name=$2
  shift 2
  limited "$limit" "$python" -m "gpu.$name" "$@" "${dry[@]}"
}

# until_end LIMIT: the time, in seconds since 1970, at which a command should come to its end by itself.
until_end() {
  local limit=$1
  (($(left) < limit)) && limit=$(left)
  echo $((EPOCHSECONDS + limit - 5))
}

machine() { module "$1" machine "$folder/machine.json"; }
build() { module "$1" build; }
tests() { module "$1" tests "$folder/tests.json"; }
sanitizer() { module "$1" sanitizer "$folder/sanitizer.json" --until "$(until_end "$1")"; }
profile() { module "$1" profiling "$folder/profile.json" --until "$(until_end "$1")"; }

sweep() {
  local end=$((SECONDS + $1)) more=() status=$device_lost
  while ((status == device_lost && end - SECONDS > 15)); do
    module $((end - SECONDS)) sweep "$folder/sweep.jsonl" --until "$(until_end $((end - SECONDS)))" "${more[@]}"
    status=$?
    more=(--go-on)
  done
  return "$status"
}

timing() {
  local end=$((SECONDS + $1)) where=cuda status=$device_lost
  ((${#dry[@]} == 0)) || where=dry
  while ((status == device_lost && end - SECONDS > 15)); do
    limited $((end - SECONDS)) "$python" -m pytest benchmarks --device "$where" -q -p no:cacheprovider \
      --seconds $(($(until_end $((end - SECONDS))) - EPOCHSECONDS - 5)) --lines "$folder/timing.jsonl"
    status=$?
  done
  return "$status"
}

failed=()
for name in "${stages[@]}"; do
  echo
  echo "=== $name"
  start=${EPOCHREALTIME/[.,]/}
  if (($(left) < 3)); then
    echo "no time left"
    status=124
  else
    "$name" "${limits[$name]}"
    status=$?
  fi
  microseconds=$((${EPOCHREALTIME/[.,]/} - start))
  printf '{"stage": "%s", "returncode": %d, "seconds": %d.%d}\n' \
    "$name" "$status" $((microseconds / 1000000)) $((microseconds / 100000 % 10)) >> "$folder/stages.jsonl"
  echo "=== $name: status $status after $((microseconds / 1000000)) s"
  ((status == 0)) || failed+=("$name")
  if [[ $name == build ]] && ((status)); then
    echo "without a build the other stages would tell nothing: stopping"
    break
  fi
done

echo
timeout --kill-after=5 20 "$python" benchmarks/report.py "$folder" --short || echo "(no summary)"
echo
if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]}; results in $folder"
else
  echo "all well: ${stages[*]}; results in $folder"
fi

# The end of the output goes through tee. It is not waited for long: a process left behind may hold its input open.
exec >&- 2>&-
for _ in {1..30}; do
  kill -0 "$tee" 2> /dev/null || break
  sleep 0.1
done
((${#failed[@]} == 0))
