# peftbench with every package pinned: trains, benchmarks and chats. No weights inside.
# `make build` builds it, `make train | infer | shell` run it, `make image-check` builds it without
# a container engine. Another base needs Debian's apt and a python3 with venv.
ARG BASE=python:3.12.12-slim-bookworm
FROM ${BASE}

# A C compiler: Triton compiles a launcher when a GPU kernel first runs.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

# The packages are a layer of their own: a change of peftbench's code does not fetch them again.
ARG TORCH_INDEX=""
COPY requirements.lock /opt/peftbench/
RUN python3 -m venv /opt/venv \
 && if [ -n "${TORCH_INDEX}" ]; then \
      /opt/venv/bin/pip install --no-cache-dir --index-url "${TORCH_INDEX}" \
        "$(grep '^torch==' /opt/peftbench/requirements.lock)"; \
    fi \
 && /opt/venv/bin/pip install --no-cache-dir -r /opt/peftbench/requirements.lock \
 && /opt/venv/bin/pip freeze > /opt/peftbench/installed.txt
COPY pyproject.toml README.md LICENSE /opt/peftbench/
COPY peftbench /opt/peftbench/peftbench
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation /opt/peftbench \
 && mkdir --mode=1777 /cache /peftbench /peftbench/output

# Whoever runs it may be any user id, so what is written goes to /cache and /peftbench/output.
ARG COMMIT=""
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/cache USER=peftbench LOGNAME=peftbench \
    HF_HOME=/cache/huggingface PEFTBENCH_CACHE=/cache/peftbench \
    TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    PYTHONUNBUFFERED=1 PEFTBENCH_COMMIT=${COMMIT} PEFTBENCH_IMAGE=peftbench:${COMMIT}
LABEL org.opencontainers.image.title="peftbench" \
      org.opencontainers.image.revision="${COMMIT}"
WORKDIR /peftbench
USER 10001
ENTRYPOINT ["peftbench"]
CMD ["--help"]
