#!/usr/bin/env bash
# The fast tests in two processes, file by file: what a file prepares for its tests is prepared once.
#   .ci/fast_tests.sh PYTHON [argument of pytest ...]
# One thread each: two processes of two threads would wait for one another. Tests of threads set their number.
set -euo pipefail
python=$1
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=default "$python" -m pytest -n 2 --dist loadfile "$@"
