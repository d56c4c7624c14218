# nemo_minitron on CPUs. From the root of the checkout:
#   docker build -f docker/cpu.Dockerfile -t minitron:cpu .
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# Dependencies in a layer of their own, which a change of the code leaves as it is. setup.py reads the version from
# __init__.py and the description from README.md.
WORKDIR /opt/nemo_minitron
COPY setup.py pyproject.toml ./
COPY nemo_minitron/__init__.py nemo_minitron/
RUN touch README.md \
    && pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu .

COPY README.md LICENSE MANIFEST.in ./
COPY nemo_minitron nemo_minitron
RUN pip install --no-cache-dir --no-deps --force-reinstall . && rm -rf build ./*.egg-info

# HOME and USER hold for any --user, one without an entry in /etc/passwd too
RUN useradd --uid 1000 --create-home minitron && install -d -o minitron -g minitron /work
ENV HOME=/tmp USER=minitron PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["minitron"]
CMD ["help"]
