# nemo_minitron in NVIDIA's NeMo container, for GPUs. From the root of the checkout:
#   docker build -f docker/nemo.Dockerfile -t minitron:nemo .
ARG NEMO=25.07
FROM nvcr.io/nvidia/nemo:${NEMO}

# Everything else is in the container, at its own versions
WORKDIR /opt/nemo_minitron
COPY setup.py pyproject.toml README.md LICENSE MANIFEST.in ./
COPY nemo_minitron nemo_minitron
RUN pip install --no-cache-dir --no-deps . && rm -rf build ./*.egg-info

# The container's own entrypoint stays: it checks the driver, then runs the command, `minitron …`
WORKDIR /work
CMD ["minitron", "help"]
