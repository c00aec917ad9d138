#!/usr/bin/env bash
# Steps of the Dockerfile; nobody calls it outside a build. It runs as root in /build.
#
#   image-packages.sh tools             pip and the SBOM tool, apart from what is installed with them
#   image-packages.sh install all|serve the packages of constraints.txt into /opt/draftline, and their SBOM
#   image-packages.sh application       Draftline itself and its CPU kernels into /stage/opt/draftline
#   image-packages.sh clean             a user for the image; no traces of apt
set -euo pipefail

PREFIX=/opt/draftline
TOOLS=/opt/tools
SHARE=share/draftline
PIP_VERSION=26.3
CYCLONEDX_VERSION=7.5.0
USER_ID=10001
# The time of every file: 1980, the earliest that a zip archive can hold.
export SOURCE_DATE_EPOCH=315532800

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
# Where packages come from is the builder's affair, and may hold a password: it is mounted for a step, never copied.
if [ -e /run/secrets/pip_conf ]; then export PIP_CONFIG_FILE=/run/secrets/pip_conf; fi
if [ -e /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi

# Into $PREFIX, which has no pip of its own.
pip_install() { "$TOOLS/bin/pip" --python "$PREFIX/bin/python" install -q --no-compile -c constraints.txt "$@"; }

# Bytecode that does not look at times, and the same time for every file: the same packages give the same layer, whatever
# commit they are built for.
settle() {
    find "$1" -name __pycache__ -type d -prune -exec rm -rf {} +
    # The compiler itself may write none on the side: what a .pth file imports would keep a time, and be passed over.
    # Packages ship templates and Python 2, which do not compile.
    PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0 "$PREFIX/bin/python" -m compileall -qq -j 0 -s "${2:-}" \
        --invalidation-mode unchecked-hash "$1"/lib/python3*/site-packages || true
    find "$1" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
}

# The names of one list in pyproject.toml.
names() {
    python3 - "$1" <<'END'
import sys, tomllib

with open("pyproject.toml", "rb") as handle:
    project = tomllib.load(handle)
chosen = project["project"]["dependencies"] if sys.argv[1] == "all" else project["dependency-groups"][sys.argv[1]]
print("\n".join(chosen))
END
}

# Name, version and licences of every package in an SBOM.
licences() {
    python3 - "$1" <<'END'
import json, sys

for component in json.load(open(sys.argv[1], encoding="utf-8"))["components"]:
    entries = component.get("licenses", [])
    names = [e.get("expression") or e["license"].get("id") or e["license"]["name"].splitlines()[0] for e in entries]
    print(component["name"], component["version"], "; ".join(names) or "not declared", sep="\t")
END
}

case ${1:?a step} in
tools)
    python3 -m venv "$TOOLS"
    "$TOOLS/bin/pip" install -q "pip==$PIP_VERSION"
    "$TOOLS/bin/pip" install -q "cyclonedx-bom==$CYCLONEDX_VERSION"
    python3 -m venv --without-pip "$PREFIX"
    ;;
install)
    names "$2" >/tmp/requirements.txt
    # torch comes first and by itself, so that its index is asked for nothing else.
    pip_install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch
    pip_install -r /tmp/requirements.txt --build-constraint constraints.txt
    mkdir -p "$PREFIX/$SHARE"
    "$TOOLS/bin/cyclonedx-py" environment --output-reproducible --of JSON \
        -o "$PREFIX/$SHARE/sbom.cdx.json" "$PREFIX/bin/python"
    licences "$PREFIX/$SHARE/sbom.cdx.json" >"$PREFIX/$SHARE/licences.tsv"
    settle "$PREFIX"
    ;;
application)
    "$TOOLS/bin/pip" --python "$PREFIX/bin/python" install -q --no-compile --no-deps --build-constraint constraints.txt \
        --prefix "/stage$PREFIX" .
    # Made from a path that nobody else has.
    find "/stage$PREFIX" -name direct_url.json -delete
    "$PREFIX/bin/python" -m draftline.native.prebuilt "/stage$PREFIX/lib/draftline"
    settle "/stage$PREFIX" /stage
    ;;
clean)
    apt-get clean
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/cache/ldconfig/aux-cache \
        /var/log/apt /var/log/dpkg.log /var/log/alternatives.log /var/lib/dpkg/*-old
    if ! grep -q "^draftline:" /etc/passwd; then
        echo "draftline:x:$USER_ID:$USER_ID:Draftline:/tmp:/usr/sbin/nologin" >>/etc/passwd
        echo "draftline:x:$USER_ID:" >>/etc/group
    fi
    ;;
*)
    echo "error: unknown step $1" >&2
    exit 2
    ;;
esac
