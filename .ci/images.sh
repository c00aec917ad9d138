#!/usr/bin/env bash
# Builds Draftline's images with whatever builder is here; `make images` and docs/images.md say more.
#
#   .ci/images.sh cpu|gpu|serve ...
#
# From the environment: BUILDER, BASE, REGISTRY, TORCH_INDEX_URL, PIP_CONF, CA_BUNDLE, BUILD_FLAGS.
# Each image gets NAME:VERSION and NAME:VERSION-REVISION; its SBOM and its list of licences go to build/images.
set -euo pipefail
cd "$(dirname "$0")/.."

builder=${BUILDER:-}
for candidate in docker podman buildah; do
    # A docker client alone builds nothing.
    if [ -z "$builder" ] && command -v "$candidate" >/dev/null && "$candidate" info >/dev/null 2>&1; then
        builder=$candidate
    fi
done
if [ -z "$builder" ]; then
    echo "error: no image builder answers (docker, podman, buildah). On Debian: sudo apt-get install buildah" >&2
    exit 1
fi

registry=${REGISTRY-ghcr.io/draftline}
version=$(sed -nE 's/^__version__ = "(.*)"$/\1/p' draftline/__init__.py)
revision=$(git rev-parse --short=12 HEAD)
if [ -n "$(git status --porcelain)" ]; then revision=$revision-dirty; fi
created=$(TZ=UTC git log -1 --format=%cd --date=format-local:%Y-%m-%dT%H:%M:%SZ)
# The time of every file, as in image-packages.sh. The commit's time, here, would make every layer new with every commit.
epoch=315532800

flags=(--build-arg "CREATED=$created" --build-arg "VERSION=$version" --build-arg "REVISION=$revision")
if [ -n "${BASE:-}" ]; then flags+=(--build-arg "BASE=$BASE"); fi
case ${BASE:-} in
*@sha256:* | sha256:* | localhost/*) ;;
*) echo "Hint: the base is named by a tag, which may move; a release gives BASE=NAME@sha256:DIGEST" ;;
esac
if [ -n "${TORCH_INDEX_URL+set}" ]; then flags+=(--build-arg "TORCH_INDEX_URL=$TORCH_INDEX_URL"); fi
if [ -n "${PIP_CONF:-}" ]; then flags+=(--secret "id=pip_conf,src=$PIP_CONF"); fi
if [ -n "${CA_BUNDLE:-}" ]; then flags+=(--secret "id=ca_bundle,src=$CA_BUNDLE"); fi
# shellcheck disable=SC2206 # several words on purpose
flags+=(${BUILD_FLAGS:-})

build() {
    case $builder in
    docker) SOURCE_DATE_EPOCH=$epoch docker build "$@" ;;
    # Layers are kept, so that the targets share what they have in common.
    podman) podman build --layers --timestamp "$epoch" "$@" ;;
    buildah) buildah bud --layers --timestamp "$epoch" "$@" ;;
    *)
        echo "error: BUILDER=$builder is not known; there are: docker, podman, buildah" >&2
        exit 2
        ;;
    esac
}

# What a file in the image holds.
read_file() {
    if [ "$builder" = buildah ]; then
        local container
        container=$(buildah from --pull-never "$1")
        buildah run ${BUILDAH_RUN_FLAGS:-} "$container" -- cat "$2"
        buildah rm "$container" >/dev/null
    else
        "$builder" run --rm --entrypoint cat "$1" "$2"
    fi
}

mkdir -p build/images
for target; do
    case $target in
    cpu | gpu | serve) ;;
    *)
        echo "error: there is no image $target; there are: cpu, gpu, serve" >&2
        exit 2
        ;;
    esac
    # The Dockerfile's labels are the one place of the images' names.
    name=$(sed -n "/ AS $target\$/,/^USER/p" Dockerfile | sed -nE 's/.*image\.title="([^"]+)".*/\1/p')
    image=${registry:+$registry/}$name
    echo "Building $image:$version ($target, with $builder)"
    build "${flags[@]}" --target "$target" --tag "$image:$version" --tag "$image:$version-$revision" .
    read_file "$image:$version" /opt/draftline/share/draftline/sbom.cdx.json >"build/images/$name.cdx.json"
    read_file "$image:$version" /opt/draftline/share/draftline/licences.tsv >"build/images/$name.licences.tsv"
    echo "Built $image:$version; build/images/$name.cdx.json is its SBOM"
done
