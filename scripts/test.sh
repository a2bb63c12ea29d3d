#!/usr/bin/env bash
# Sets up, then runs lint and tests, from any folder:
#   bash scripts/test.sh [--all] [--oldest] [pytest arguments]
# --all adds what waits on real time or takes minutes: SLURM on three machines, kernels counted without a GPU,
# functions that Inductor compiles, more kills. --oldest tests the oldest versions that requirements.txt admits.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # hundreds of processes would each compile what they import

setup=(--dev --app) venv=.venv chosen=(-n 2)
while [[ ${1:-} == --all || ${1:-} == --oldest ]]; do
    # With --all a third process waits for SLURM most of the time.
    if [[ $1 == --all ]]; then chosen=(-n 3 -m "not gpu"); else setup+=(--oldest) venv=.venv-oldest; fi
    shift
done

install_chromium() { # The page is tested in a browser; without one those tests are skipped.
    if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then
        echo "installing Debian's chromium"
        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; } \
            >/dev/null || echo "chromium could not be installed" >&2
    fi
}

install_chromium &
bash environment_setup.sh "${setup[@]}"
wait
status=0
"$venv/bin/python" -m ruff check . || { status=1; echo "lint failed: see above" >&2; }
"$venv/bin/python" -m pytest --dist loadfile --no-loadscope-reorder "${chosen[@]}" "$@" || status=$?
if [[ ${chosen[*]} == "-n 2" ]]; then
    echo "left out: SLURM on three machines, kernel counts, Inductor, torch-fidelity's own evaluation, more kills and variants: bash scripts/test.sh --all"
fi
exit "$status"
