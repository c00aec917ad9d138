#!/usr/bin/env bash
# Makes a virtual environment with the first fitting Python of this machine.
#
#   .ci/venv.sh DIR      PYTHON=/path/to/python .ci/venv.sh DIR
#
# An environment that works is left as it is; one that is half made or of a Python that is gone is made anew.
set -euo pipefail

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if fits "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    cat >&2 <<END
error: no Python 3.11 or 3.12 found (looked for: ${PYTHON:-python3.11, python3.12, python3}). Install one:
  Debian 12      sudo apt-get install python3.11 python3.11-venv
  Ubuntu 24.04   sudo apt-get install python3.12 python3.12-venv
  elsewhere      (Debian 13 packages 3.13 alone) uv python install 3.12, with uv from https://docs.astral.sh/uv; or pyenv
Then start again. A Python that is not on the path has to be named: make setup PYTHON="\$(uv python find --system 3.12)"
END
    return 1
}

# Debian ships ensurepip, which puts pip into a new environment, in a package of its own.
provide_ensurepip() {
    local package
    "$1" -c 'import ensurepip' >/dev/null 2>&1 && return
    package=python$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "error: $1 cannot make virtual environments. Install its venv package: sudo apt-get install $package" >&2
        return 1
    fi
    echo "Installing $package"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null
}

dir=${1:?usage: .ci/venv.sh DIR}
if fits "$dir/bin/python" && "$dir/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi
python=$(find_python)
provide_ensurepip "$python"
echo "Creating $dir with $python"
"$python" -m venv --clear "$dir"
