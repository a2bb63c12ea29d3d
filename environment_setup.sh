#!/usr/bin/env bash
# Makes the Python environment of LPD and puts this repository on its path. Quick if nothing has changed.
#   bash environment_setup.sh [--dev] [--data] [--app] [--oldest] [ENV]
# With a name ENV, and conda installed: a conda environment of that name. Otherwise a virtual environment in
# .venv of this repository. --dev adds the packages for the tests, --data those to read parquet (in --dev too),
# --app those for the page; --oldest makes .venv-oldest, with the oldest versions that requirements.txt admits;
# PYTHON=... selects the Python (3.10 or later).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage_error() { echo "error: $*" >&2; exit 2; }
failure() { echo "error: $*" >&2; exit 1; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
recent() {
    local version
    version=$(version_of "$1") && ((${version%.*} > 3 || (${version%.*} == 3 && ${version#*.} >= 10)))
}

find_python() { # sets python
    if [[ -n ${PYTHON:-} ]]; then
        recent "$PYTHON" ||
            usage_error "PYTHON=$PYTHON is not Python 3.10 or later but $(version_of "$PYTHON" || echo "no Python")"
        python=$PYTHON
        return
    fi
    for python in python3 python3.13 python3.12 python3.11 python3.10; do
        if recent "$python"; then return; fi
    done
    failure "no Python 3.10 or later found (python3 is $(version_of python3 || echo 'not here')): set PYTHON=..."
}

make_venv() {
    "$python" -m venv --clear "$venv" && return
    # Debian has venv's pip in a separate package.
    if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
        echo "installing Debian's python3-venv"
        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y python3-venv; } >/dev/null &&
            "$python" -m venv --clear "$venv" && return
    fi
    failure "$python cannot make a virtual environment: install its venv module (Debian: python3-venv)"
}

setup_venv() { # sets prefix
    prefix=$PWD/$venv
    local inside=$prefix/bin/python
    if [[ -x $inside ]] && recent "$inside" && "$inside" -m pip --version >/dev/null 2>&1; then return; fi
    if [[ -e $prefix ]]; then echo "$venv does not work: making it again"; fi
    echo "making the virtual environment $venv with Python $(version_of "$python")"
    make_venv
    # Python brings an old one: for what follows 3.11 has one that takes 1.7 times the processor time.
    "$inside" -m pip install --quiet --root-user-action=ignore --upgrade pip ||
        echo "pip could not be upgraded: going on with Python's own"
}

setup_conda() { # sets prefix
    if ! conda run -n "$1" python --version >/dev/null 2>&1; then
        echo "making the conda environment $1"
        conda create -y -q -n "$1" python=3.12 pip || failure "conda cannot make the environment $1"
    fi
    prefix=$(conda run -n "$1" python -c 'import sys; print(sys.prefix)')
    recent "$prefix/bin/python" ||
        usage_error "conda environment $1 has Python $(version_of "$prefix/bin/python"): LPD needs 3.10 or later"
}

free_space() { df -Ph "$prefix" | awk 'END {print $4}'; }

install() { # A copy of each installed file stays in the environment, so nothing is installed twice.
    local file compile=--no-compile new=() flags=()
    mkdir -p "$prefix/lpd"
    for file in "$@"; do
        if ! cmp -s "$file" "$prefix/lpd/$file"; then new+=("$file") flags+=(-r "$file"); fi
    done
    if [[ -z ${new[*]} ]]; then return; fi
    if [[ $venv == .venv-oldest ]]; then
        sed -n '/^#/!s/>=/==/p' requirements.txt requirements-data.txt >"$prefix/lpd/oldest.txt"
        flags+=(-c "$prefix/lpd/oldest.txt")
    fi
    echo "installing ${new[*]} (with torch this is several GB: a minute or more)"
    # A module is compiled when it is first imported, most never, unless Python may write nothing then.
    if [[ -n ${PYTHONDONTWRITEBYTECODE:-} ]]; then compile=--compile; fi
    "$prefix/bin/python" -m pip install --disable-pip-version-check --root-user-action=ignore "$compile" \
        "${flags[@]}" ||
        failure "installing ${new[*]} into $prefix failed ($(free_space) free there): run this again to resume"
    cp "${new[@]}" "$prefix/lpd/"
}

add_to_path() { # so that the programs import the repository's modules from any folder
    local site
    site=$("$prefix/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    [[ $(cat "$site/lpd.pth" 2>/dev/null) == "$PWD" ]] || echo "$PWD" >"$site/lpd.pth"
}

files=(requirements.txt)
venv=.venv
name=
for arg in "$@"; do
    case $arg in
        --dev) files+=(requirements-data.txt requirements-dev.txt) ;;
        --data) files+=(requirements-data.txt) ;;
        --app) files+=(requirements-app.txt) ;;
        --oldest) venv=.venv-oldest ;;
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]##*/}"; exit ;;
        -*) usage_error "unknown flag $arg: bash environment_setup.sh [--dev] [--data] [--app] [--oldest] [ENV]" ;;
        *)
            if [[ -n $name ]]; then usage_error "one name at most: $name, $arg"; fi
            name=$arg
            ;;
    esac
done

if [[ -n $name ]] && command -v conda >/dev/null; then
    setup_conda "$name"
    use="conda activate $name"
else
    if [[ -n $name ]]; then echo "no conda: using $venv instead of $name"; fi
    find_python
    setup_venv
    use="source $prefix/bin/activate"
fi
install "${files[@]}"
add_to_path
echo "environment ready: $use"
