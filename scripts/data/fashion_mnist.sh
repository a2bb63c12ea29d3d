#!/usr/bin/env bash
# Fashion-MNIST as an ImageNet-style folder: DIR/train/<class>/*.png and DIR/val/<class>/*.png, 32x32 grey.
#   bash scripts/data/fashion_mnist.sh DIR
# The source is Debian's package dataset-fashion-mnist (installed if this runs as root on Debian), otherwise
# torchvision's download. A complete DIR is left as it is, an incomplete one is completed.
set -euo pipefail

if [[ $# -ne 1 || $1 == -* ]]; then
    echo "usage: bash scripts/data/fashion_mnist.sh DIR" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

package=dataset-fashion-mnist
finished() { [[ -d $1/train && -d $1/val ]]; }
installed() { [[ -s /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz ]]; }
if ! finished "$1" && ! installed && [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
    echo "installing Debian's package $package"
    apt_get() { DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" >/dev/null 2>&1; }
    apt_get install -y "$package" || { apt_get update && apt_get install -y "$package"; } ||
        echo "$package cannot be installed here: downloading with torchvision instead"
fi
exec "$python" "$repo/scripts/data/fashion_mnist.py" "$1"
