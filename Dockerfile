# hvd_qsgd on CPUs: torch, Horovod with MPI and Gloo, the examples, and an ssh server for jobs over several hosts.
#
#     docker build -t hvd-qsgd .
#     docker run --rm hvd-qsgd python examples/demo.py
#     docker run --rm $(docker build -q --target test .)
#
# On Linux the default build of torch carries CUDA, a download of some gigabytes. A CPU build of the same version comes
# from another index: --build-arg PIP_EXTRA_INDEX_URL=..., see the index that torch's own installation page names.

FROM debian:bookworm-20250520-slim AS base
ARG DEBIAN_FRONTEND=noninteractive
# A release of Debian keeps one version of each package at a time: naming versions would break with the next update.
# Keys of ssh hosts would be the same in every container; serve-ssh makes new ones.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends openmpi-bin openssh-client openssh-server python3 \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*
ENV PATH=/opt/hvd-qsgd/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

FROM base AS build
ARG DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends cmake g++ gcc libopenmpi-dev make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
# Every version that pip chooses, here and inside install-horovod, is the one that the project is tested with.
COPY requirements/development.txt requirements/
ENV PIP_CONSTRAINT=/build/requirements/development.txt PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3013
RUN python3 -m venv /opt/hvd-qsgd \
    && pip install mpi4py numpy torch
# These two files alone, so that a change elsewhere does not compile Horovod again.
COPY hvd_qsgd/errors.py hvd_qsgd/commands/install_horovod.py hvd_qsgd/
RUN python -c "from hvd_qsgd import install_horovod; install_horovod.install()" \
    && rm -rf /root/.cache
COPY LICENSE MANIFEST.in README.md pyproject.toml setup.cfg ./
COPY hvd_qsgd hvd_qsgd
# hadolint ignore=DL3013
RUN pip install ".[torch,mpi,state,demo]"

# The tests that need nothing but this image; `docker run` of this stage runs them.
FROM build AS test
# hadolint ignore=DL3013
RUN pip install hypothesis ml_dtypes psutil pytest pytest-timeout typer
COPY tests tests
COPY tools tools
COPY docs docs
COPY examples examples
RUN useradd --create-home --uid 1000 horovod && chown -R horovod /build
USER 1000
CMD ["python", "-m", "pytest", "-m", "not slow", "tests/test_qsgd.py", "tests/test_exchanges.py", "tests/test_golden.py", "tests/test_mpi_collectives.py"]

FROM base AS runtime
RUN useradd --create-home --uid 1000 --shell /bin/bash horovod \
    && install -d -m 700 -o horovod -g horovod /home/horovod/.ssh /home/horovod/.sshd
COPY --from=build /opt/hvd-qsgd /opt/hvd-qsgd
COPY deploy/container/ssh_config /etc/ssh/ssh_config.d/hvd-qsgd.conf
COPY deploy/container/sshd_config /etc/ssh/sshd_config
COPY --chmod=755 deploy/container/serve-ssh /usr/local/bin/serve-ssh
COPY --chown=horovod examples /home/horovod/examples
# By number, so that Kubernetes can see that it is not root.
USER 1000
WORKDIR /home/horovod
EXPOSE 2222
HEALTHCHECK --interval=5m --timeout=60s --start-period=60s CMD ["hvd-qsgd", "doctor"]
# Waits for horovodrun or mpirun of another container. Keys come in a volume at /home/horovod/.ssh.
CMD ["serve-ssh"]
