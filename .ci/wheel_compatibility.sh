#!/usr/bin/env bash
# A wheel built against an older CPU torch, in an environment with a newer CUDA torch: both libraries load, kernels are
# registered for the GPU though there is none, and the fast tests and those with timm pass.
#   .ci/wheel_compatibility.sh WHEEL NEW_ENVIRONMENT
# LOSSMETA_SKIP_NEWER_TORCH=1 leaves it out, where no package index has that torch.
set -euo pipefail
wheel=$1
environment=$2
newer=${LOSSMETA_NEWER_TORCH:-2.14.1}
if [[ ${LOSSMETA_SKIP_NEWER_TORCH:-} == 1 ]]; then
  echo "SKIPPED: LOSSMETA_SKIP_NEWER_TORCH=1, nothing was run with torch $newer"
  exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

"${PYTHON:-python3}" -m venv "$environment"
trap 'rm -rf "$environment"' EXIT
if ! "$environment/bin/pip" install -qq "torch==$newer" > "$environment/torch.log" 2>&1; then
  echo "torch $newer could not be installed: $(tail -1 "$environment/torch.log")" >&2
  echo "LOSSMETA_SKIP_NEWER_TORCH=1 leaves this check out" >&2
  exit 1
fi
"$environment/bin/pip" install -qq "$wheel[test]" "pytest-xdist>=3.6"
cd "$environment"
"$environment/bin/python" - <<'PY'
import glob
import os

import torch

import lossmeta
from lossmeta import _build

package = os.path.dirname(lossmeta.__file__)
print(f"torch {torch.__version__} (CUDA {torch.version.cuda}), lossmeta in {package}")
if not glob.glob(f"{package}/_cuda*.so"):
    print("the wheel has no CUDA library: nothing to load")
elif torch.version.cuda is None:
    raise SystemExit("this torch is built without CUDA: it cannot show that the CUDA library loads")
else:
    assert _build.why_no_cuda is None, _build.why_no_cuda
    for name, backends in lossmeta.info()["operators"].items():
        print(f"{name}: {backends}")
        assert set(backends.values()) == {"compiled"}, name
PY
cd - > /dev/null
.ci/fast_tests.sh "$environment/bin/python"
# timm needs torchvision, which is there for this torch.
"$environment/bin/pip" install -qq timm
"$environment/bin/python" -m pytest -q tests/integrations/test_timm.py
