#!/usr/bin/env bash
# Everything that waits for a GPU, in pieces of under ten minutes: tests, speed and memory, a training.
#   bash scripts/gpu_day.sh [--list] [--tiny] [PIECE ...]       see scripts/gpu_day.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PYTHONPATH=$repo exec "$python" "$repo/scripts/gpu_day.py" "$@"
