# For cores:
#
#     docker build -t virnuc_dask .
#     docker run --rm -v "$PWD:/data" virnuc_dask run proteins.faa proteins.zarr --model esm2_t6_8M_UR50D
#
# For NVIDIA GPUs, whose kernels are compiled when they are first used:
#
#     docker build -t virnuc_dask:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 \
#         --build-arg EXTRAS=cuda,export,s3 --build-arg COMPILER="gcc libc6-dev" .
#     docker run --rm --gpus all --shm-size 1g -v "$PWD:/data" virnuc_dask:cuda run … --cluster local-cuda
#
# Weights are downloaded to /data/.cache, so that they stay.
FROM python:3.12-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY virnuc_dask virnuc_dask
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=export,s3
ARG COMPILER=""
# hadolint ignore=DL3008,SC2086
RUN if [ -n "$COMPILER" ]; then \
        apt-get update && apt-get install -y --no-install-recommends $COMPILER && rm -rf /var/lib/apt/lists/*; \
    fi
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" "$(echo /wheels/*.whl)[$EXTRAS]"
RUN useradd --uid 1000 --create-home virnuc
USER 1000
WORKDIR /data
ENV XDG_CACHE_HOME=/data/.cache
ENTRYPOINT ["virnuc-dask"]
CMD ["doctor"]
