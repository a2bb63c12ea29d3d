#!/usr/bin/env bash
# Sets up, then runs lint and tests, from any folder: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash environment_setup.sh --dev --app
# The page is tested in a browser; without one those tests are skipped.
if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then
    echo "installing Debian's chromium"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; } \
        >/dev/null || echo "chromium could not be installed" >&2
fi
status=0
.venv/bin/python -m ruff check . || { status=1; echo "lint failed: see above" >&2; }
# One process waits for SLURM most of the time, and two share the cores.
.venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@" || status=$?
exit "$status"
