# Moonshard's image, with the nano model in it.
#
#   docker build -t moonshard:0.1.0-cpu .
#   docker build -t moonshard:0.1.0-gpu --build-arg TARGET=gpu .
#
# The environment is built by scripts/setup, as on any machine. Nodes of one cluster may mix both
# builds: Python and Ray are the same in them.

# Debian's python:3.11.16-slim-bookworm, by digest: a tag is built anew every few weeks.
ARG BASE=docker.io/library/python:3.11.16-slim-bookworm@sha256:0bee7276f83efd4a1ee05bbbf4281d95ed28e079220a9457f25a93e3f1e3c31b

# What runs needs of the system: a compiler, since vLLM compiles the model when it starts, and
# libnuma for its CPU ops.
FROM ${BASE} AS system
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

FROM system AS build
# cpu or gpu.
ARG TARGET=cpu
WORKDIR /opt/moonshard
COPY . .
# MOONSHARD_DEV=0: without what only tests and checks need.
RUN case "$TARGET" in \
        cpu) MOONSHARD_DEV=0 MOONSHARD_VENV=/opt/moonshard/.venv scripts/setup ;; \
        gpu) MOONSHARD_DEV=0 MOONSHARD_VENV=/opt/moonshard/.venv scripts/setup --gpu ;; \
        *) echo "TARGET must be cpu or gpu, not $TARGET" >&2; exit 1 ;; \
    esac
# Pods have a read-only root file system: nothing can be compiled to bytecode later.
RUN .venv/bin/python -m compileall -q cluster deployments models monitoring routing

FROM system
ARG TARGET=cpu
LABEL org.opencontainers.image.title="Moonshard" \
      org.opencontainers.image.description="Mixture-of-experts models on Ray, ${TARGET} build" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 1000 moonshard \
    && useradd --uid 1000 --gid 1000 --create-home moonshard \
    && install -d -o moonshard -g moonshard /var/lib/moonshard /var/cache/moonshard
# Root's, so that no process of a pod can change what runs.
COPY --from=build /opt/moonshard /opt/moonshard
ENV PATH=/opt/moonshard/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/moonshard
USER 1000:1000
RUN ["moonshard", "--help"]
CMD ["moonshard", "--help"]
