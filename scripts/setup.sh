#!/usr/bin/env bash
# Set up the virtual environment given as the first argument: system libraries, torch, then everything else, pinned.
# For bash 3.2 as well, which macOS has.
set -euo pipefail
venv=${1:-.venv}
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }
stop() { printf '%s\n' '' "$@" >&2; exit 1; }

# -- Python ------------------------------------------------------------------------------------------------------------
find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.11 python3.12 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}
python=$(find_python) || stop "found: no Python >= 3.11 on this machine" "expected: Python 3.11 or newer" \
    "next: install it (apt-get install python3 python3-venv; dnf install python3; brew install python), or PYTHON=/path/to/python3 make setup"

# -- System libraries: a software renderer for MuJoCo, and a colour-emoji font -----------------------------------------
# No `| grep -q` here: it closes the pipe early, which `pipefail` takes for a failure.
has_library() { [[ $(ldconfig -p 2>/dev/null || /sbin/ldconfig -p) == *"$1"* ]]; }
fonts=src/vlm4vla/sims/grinningface/fonts.txt
has_emoji_font() {
    local font
    while read -r font; do
        if [ -f "${font/#\~/$HOME}" ]; then return 0; fi
    done <"$fonts"
    return 1
}
missing_packages() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    [ "$(uname)" = Linux ] || return 0 # macOS brings OpenGL and Apple Color Emoji
    has_library libOSMesa || echo libosmesa6
    has_library libEGL.so.1 || echo libegl1
    has_emoji_font || echo fonts-noto-color-emoji
}
install_packages() {
    local as_root=env
    [ "$(id -u)" = 0 ] || as_root="sudo -n env"
    command -v apt-get >/dev/null || return 1
    $as_root true 2>/dev/null || return 1
    $as_root apt-get update -qq || true # an offline mirror may still hold the packages
    $as_root DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}
missing=$(missing_packages | tr '\n' ' ')
if [ -n "$missing" ]; then
    say "system packages: $missing"
    # shellcheck disable=SC2086 (words are meant to split)
    install_packages $missing || true # judged by what is there afterwards
    missing=$(missing_packages | tr '\n' ' ')
    [ -z "$missing" ] || stop \
        "found: these system packages are missing and could not be installed from here: $missing" \
        "expected: a software OpenGL (OSMesa and EGL), a colour-emoji font and Python's venv" \
        "next, as an administrator, one of" \
        "    apt-get install libosmesa6 libegl1 fonts-noto-color-emoji python3-venv" \
        "    dnf install mesa-libOSMesa mesa-libEGL google-noto-color-emoji-fonts" \
        "    brew install python              # macOS needs nothing else" \
        "then run the same command again."
fi

# -- Python packages: torch first, so that nothing draws another build of it in ------------------------------------------
# Without a GPU, pip's usual torch brings gigabytes of CUDA along; PIP_EXTRA_INDEX_URL can name an index of CPU builds.
[ -x "$venv/bin/python" ] || { say "virtual environment $venv with $python"; "$python" -m venv "$venv"; }
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
torch=$(grep -E '^torch==' constraints.txt)
say "$torch"
"${pip[@]}" install -q "$torch"
say "vlm4vla and the rest, pinned by constraints.txt"
"${pip[@]}" install -q -c constraints.txt -e ".[train,grinningface,data,serve,dev]"
say "set up; what this machine can do: $venv/bin/vlm4vla doctor"
