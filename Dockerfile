# Two images: `docker build .` builds the server, `docker build --target trainer .` a trainer with the client and Keras.
# To pin the base image by digest, pass --build-arg BASE=docker.io/library/python@sha256:…
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV PYTHONDONTWRITEBYTECODE=1 UV_COMPILE_BYTECODE=0 UV_NO_CACHE=1 UV_LINK_MODE=copy
WORKDIR /src
RUN python -m venv /opt/uv && /opt/uv/bin/pip install --quiet --no-cache-dir uv==0.13.8

FROM build AS build-server
# For `strip`; the image itself has none of it.
RUN apt-get update -qq && apt-get install -qqy --no-install-recommends binutils
# Install the dependencies first: they change less often than the code, so this layer stays in the build cache.
COPY requirements/server.txt requirements/server.txt
RUN python -m venv --without-pip /opt/h5feed \
 && /opt/uv/bin/uv pip install --quiet --python /opt/h5feed/bin/python -r requirements/server.txt
COPY LICENSE README.md pyproject.toml ./
COPY client client
COPY app app
RUN /opt/uv/bin/uv pip install --quiet --python /opt/h5feed/bin/python --no-deps ./client .
COPY deploy/image deploy/image
# Compile bytecode last, after files were removed: containers cannot write it, because their file system is read-only.
RUN /opt/h5feed/bin/python deploy/image/slim.py \
 && /opt/h5feed/bin/python -m compileall -q -j 0 /opt/h5feed/lib \
 && /opt/h5feed/bin/python deploy/image/check_image.py

FROM build AS build-trainer
# The Keras backend, such as jax[cuda13], torch or tensorflow.
ARG BACKEND=jax
COPY requirements/trainer.txt requirements/trainer.txt
RUN python -m venv --without-pip /opt/h5feed \
 && /opt/uv/bin/uv pip install --quiet --python /opt/h5feed/bin/python -r requirements/trainer.txt \
 && /opt/uv/bin/uv pip install --quiet --python /opt/h5feed/bin/python -c requirements/trainer.txt "${BACKEND}"
COPY LICENSE README.md pyproject.toml ./
COPY client client
RUN /opt/uv/bin/uv pip install --quiet --python /opt/h5feed/bin/python --no-deps ./client \
 && /opt/h5feed/bin/python -m compileall -q -j 0 /opt/h5feed/lib

FROM ${BASE} AS trainer
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 KERAS_BACKEND=jax KERAS_HOME=/tmp/keras PATH=/opt/h5feed/bin:$PATH
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin h5feed \
 && install -d -o h5feed -g h5feed /data /run/h5feed
COPY --from=build-trainer /opt/h5feed /opt/h5feed
COPY app/h5feed_server/demo.py /opt/h5feed/demo.py
LABEL org.opencontainers.image.title="h5feed-trainer" \
      org.opencontainers.image.description="Client of h5feed, with Keras" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="0.1.0"
USER h5feed
WORKDIR /tmp
CMD ["python"]

FROM ${BASE} AS server
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PATH=/opt/h5feed/bin:$PATH
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin h5feed \
 && install -d -o h5feed -g h5feed /cache /data /run/h5feed
COPY --from=build-server /opt/h5feed /opt/h5feed
LABEL org.opencontainers.image.title="h5feed-server" \
      org.opencontainers.image.description="Serves training batches from HDF5 files over HTTP" \
      org.opencontainers.image.licenses="MIT AND Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
USER h5feed
WORKDIR /
ENV H5FEED_HOST=0.0.0.0 H5FEED_PORT=8000 H5FEED_CACHE_DIR=/cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["/opt/h5feed/bin/python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["/opt/h5feed/bin/h5feed-server"]
CMD ["serve", "/data"]
