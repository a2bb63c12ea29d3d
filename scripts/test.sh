#!/usr/bin/env bash
# Sets up, then lint and tests: `bash scripts/test.sh [pytest arguments]`, from anywhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash environment_setup.sh --dev
status=0
.venv/bin/python -m ruff check . || { status=1; echo "lint failed: see above" >&2; }
.venv/bin/python -m pytest "$@" || status=$?
exit "$status"
