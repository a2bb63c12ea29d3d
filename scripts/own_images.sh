#!/usr/bin/env bash
# From a folder of images to samples: chooses grid, model, epochs and rates, prints them and the expected time,
# tunes a tokenizer, trains an LPD model, and ends with samples, the loss curve and reconstructions.
#   bash scripts/own_images.sh DATA [OUTPUT] [--minutes 30] [--model NAME] [--no_mirror] [--background COLOUR] ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec "$python" "$repo/scripts/own_images.py" "$@"
