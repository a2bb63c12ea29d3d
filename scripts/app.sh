#!/usr/bin/env bash
# Sets up, then starts the page to generate and edit images in a browser, on this machine alone.
#   bash scripts/app.sh [flags of demo/app.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

bash "$repo/environment_setup.sh" --app
exec "$repo/.venv/bin/python" "$repo/demo/app.py" "$@"
