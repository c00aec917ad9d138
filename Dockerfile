# Draftline's images: targets `cpu`, `gpu` and `serve`. `make images` builds them; docs/images.md has the rest.
#
# Nothing is fetched but Debian packages from the base's own sources and Python packages in the versions of
# constraints.txt. No BuildKit front end is named, so that docker, podman and buildah need none.

# Any Debian with Python 3.11 or 3.12 as python3, and its venv module. A release gives the digest: --build-arg
# BASE=docker.io/library/python@sha256:...
ARG BASE=docker.io/library/python:3.11.14-slim-bookworm

# -- What builds, and stays behind ---------------------------------------------------------------------------------------
FROM ${BASE} AS tools
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++ libc6-dev
COPY .ci/image-packages.sh constraints.txt pyproject.toml /build/
WORKDIR /build
RUN --mount=type=secret,id=pip_conf --mount=type=secret,id=ca_bundle \
    ./image-packages.sh tools

# PyTorch without CUDA comes from an index of its own; the default index has the CUDA build for x86-64.
FROM tools AS packages-cpu
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN --mount=type=secret,id=pip_conf --mount=type=secret,id=ca_bundle \
    ./image-packages.sh install all

FROM tools AS packages-gpu
RUN --mount=type=secret,id=pip_conf --mount=type=secret,id=ca_bundle \
    ./image-packages.sh install all

# An empty TORCH_INDEX_URL gives replicas CUDA; see `make images`.
FROM tools AS packages-serve
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN --mount=type=secret,id=pip_conf --mount=type=secret,id=ca_bundle \
    ./image-packages.sh install serve

# Draftline itself, in a layer of its own: a changed line of code moves megabytes, not gigabytes.
FROM tools AS application
COPY README.md LICENSE /build/
COPY draftline /build/draftline
COPY components /build/components
COPY pipelines /build/pipelines
COPY ray_jobs /build/ray_jobs
COPY serving /build/serving
RUN --mount=type=secret,id=pip_conf --mount=type=secret,id=ca_bundle \
    ./image-packages.sh application

# -- What runs -----------------------------------------------------------------------------------------------------------
# KubeRay asks the Serve proxy of a worker with wget; the CPU kernels need OpenMP's library.
FROM ${BASE} AS runtime
COPY .ci/image-packages.sh /tmp/image-packages.sh
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends wget libgomp1 \
    && /tmp/image-packages.sh clean
# Everything is written below HOME and /tmp, which are one volume unless the pod says otherwise; the rest is read-only.
# USER is for programs that ask for a name where the pod gives another UID.
ENV PATH=/opt/draftline/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp \
    USER=draftline \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DRAFTLINE_KERNELS=/opt/draftline/lib/draftline \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /tmp
CMD ["draftline", "--help"]

# Triton compiles what launches its kernels.
FROM runtime AS runtime-gpu
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends gcc libc6-dev \
    && header="$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
    && if ! test -e "$header"; then \
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libpython3-dev; fi \
    && test -e "$header" \
    && /tmp/image-packages.sh clean
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Steps of the pipeline, Ray jobs and checks, on CPUs.
FROM runtime AS cpu
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
COPY --from=packages-cpu /opt/draftline /opt/draftline
COPY --from=application /stage/opt/draftline /opt/draftline
LABEL org.opencontainers.image.title="draftline-python" \
    org.opencontainers.image.description="Draftline's pipeline steps, Ray jobs and checks, on CPUs" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${CREATED}" \
    org.opencontainers.image.licenses="MIT" \
    io.draftline.sbom="/opt/draftline/share/draftline/sbom.cdx.json"
# Registered versions name the code that made them.
ENV DRAFTLINE_COMMIT=${REVISION}
USER 10001:10001

# The same with CUDA.
FROM runtime-gpu AS gpu
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
COPY --from=packages-gpu /opt/draftline /opt/draftline
COPY --from=application /stage/opt/draftline /opt/draftline
LABEL org.opencontainers.image.title="draftline-python-gpu" \
    org.opencontainers.image.description="Draftline's pipeline steps and Ray jobs, on NVIDIA GPUs" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${CREATED}" \
    org.opencontainers.image.licenses="MIT" \
    io.draftline.sbom="/opt/draftline/share/draftline/sbom.cdx.json"
# Registered versions name the code that made them.
ENV DRAFTLINE_COMMIT=${REVISION}
USER 10001:10001

# Replicas of the endpoint: no pipelines, no trackers' servers, no plots.
FROM runtime AS serve
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
COPY --from=packages-serve /opt/draftline /opt/draftline
COPY --from=application /stage/opt/draftline /opt/draftline
LABEL org.opencontainers.image.title="draftline-serve" \
    org.opencontainers.image.description="Draftline's endpoint on Ray Serve" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${CREATED}" \
    org.opencontainers.image.licenses="MIT" \
    io.draftline.sbom="/opt/draftline/share/draftline/sbom.cdx.json"
CMD ["ray", "--help"]
USER 10001:10001
