# Where a worker of data_pipelines.extract runs on Dataflow, Flink or Spark: Beam's image, what this package needs, this
# package. To be built from the root of the repository; Python and Beam must be those of the machine that hands in jobs.
ARG PYTHON=3.11
ARG BEAM=2.77.0
FROM apache/beam_python${PYTHON}_sdk:${BEAM}

WORKDIR /opt/spjax

# Apart from the code, so that a change of it builds in seconds
COPY pyproject.toml README.md LICENSE NOTICE ./
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[data]'

COPY . ./
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# A worker is one of many on its machine: one thread each, as data_pipelines/parts.py sets it
ENV OMP_NUM_THREADS=1 \
    OPENBLAS_NUM_THREADS=1 \
    MKL_NUM_THREADS=1 \
    NUMBA_NUM_THREADS=1 \
    NPROC=1 \
    PJRT_NPROC=1 \
    XLA_PYTHON_CLIENT_PREALLOCATE=false

# The entry point stays Beam's, which starts a worker, or by --worker_pool a pool of them on port 50000
