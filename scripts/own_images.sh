#!/usr/bin/env bash
# From a folder of images to samples: chooses grid, model, epochs and rates, prints them and the expected time,
# trains a tokenizer and an LPD model, and ends with samples, the loss curve and reconstructions.
#   bash scripts/own_images.sh DATA [OUTPUT] [--minutes 30] [--no_mirror] [--skip_unreadable] [--dry_run]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # waiting threads release their core
exec "$python" "$repo/scripts/own_images.py" "$@"
