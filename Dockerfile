FROM python:3.11-slim-bookworm

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /src
# The dependencies first: they change less often than the code, and this layer is kept.
COPY requirements/server.txt requirements/server.txt
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin h5feed \
 && install -d -o h5feed -g h5feed /cache /data \
 && python -m venv /opt/h5feed \
 && /opt/h5feed/bin/pip install --no-cache-dir uv \
 && /opt/h5feed/bin/uv pip install --python /opt/h5feed/bin/python --no-cache --compile-bytecode -r requirements/server.txt
COPY LICENSE README.md pyproject.toml ./
COPY client client
COPY app app
RUN /opt/h5feed/bin/uv pip install --python /opt/h5feed/bin/python --no-cache --compile-bytecode --no-deps ./client .

USER h5feed
WORKDIR /
ENV H5FEED_HOST=0.0.0.0 H5FEED_PORT=8000 H5FEED_CACHE_DIR=/cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["/opt/h5feed/bin/python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["/opt/h5feed/bin/h5feed-server"]
CMD ["serve", "/data"]
