#!/usr/bin/env bash
# Sets up, then serves the page for generating and editing images, to this machine only.
#   bash scripts/app.sh [flags of demo/app.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

bash "$repo/environment_setup.sh" --app
exec "$repo/.venv/bin/python" "$repo/demo/app.py" "$@"
