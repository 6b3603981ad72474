# spectr serve on a CPU, from the wheels of this repository: make dist, then docker build -t spectr .
FROM python:3.12-slim-bookworm

# The compiler makes the CPU kernels when the first model is composed.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY requirements/torch.txt requirements/constraints.txt /tmp/requirements/
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu --requirement /tmp/requirements/torch.txt

COPY dist/*.whl /tmp/wheels/
RUN pip install --no-cache-dir --constraint /tmp/requirements/constraints.txt --find-links /tmp/wheels \
    "spectr-lora[serve,demo]==0.2.0" \
    && rm -rf /tmp/wheels /tmp/requirements \
    && useradd --create-home --uid 10001 spectr

USER 10001
WORKDIR /home/spectr
EXPOSE 8000
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]

# Other addresses than a loopback one need a policy: docker run -p 8000:8000 -v ./keys.yaml:/etc/spectr/keys.yaml:ro spectr
ENTRYPOINT ["spectr", "serve", "--host", "0.0.0.0", "--policy", "/etc/spectr/keys.yaml"]
