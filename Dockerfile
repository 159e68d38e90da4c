# Everything in a container: JupyterLab on the notebooks, and the commands of the README.
#
#     docker build -t masksae .
#     docker run --rm -p 127.0.0.1:8888:8888 masksae              # open the address that it prints
#     docker run --name smoke masksae make repro PROFILE=smoke    # then: docker cp smoke:/home/reader/masksae/build/site .
#
# A volume on /home/reader/.cache keeps downloads. Without a GPU the CPU build of PyTorch is enough, and gigabytes
# smaller: --build-arg PIP_EXTRA_INDEX_URL=... with the address of PyTorch's own index of CPU builds.

FROM python:3.11-slim AS tools
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
# the folders are the reader's before anything is copied into them: WORKDIR would make root's
RUN useradd --create-home reader && install -d -o reader /home/reader/.cache /home/reader/masksae

FROM tools
ARG PIP_EXTRA_INDEX_URL=
USER reader
WORKDIR /home/reader/masksae
COPY --chown=reader . .
RUN make setup && rm -rf /home/reader/.cache/pip
ENV PATH="/home/reader/masksae/.venv/bin:$PATH"
EXPOSE 8888
CMD ["jupyter", "lab", "--config", "notebooks/jupyter_server_config.py", "--ip", "0.0.0.0", "--no-browser", "notebooks"]
