FROM python:3.11-slim-bookworm

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin h5feed \
 && install -d -o h5feed -g h5feed /cache /data

WORKDIR /src
# The dependencies first: they change less often than the code, and this layer is kept.
COPY requirements/server.txt requirements/server.txt
RUN pip install --no-cache-dir uv && uv pip install --system --no-cache -r requirements/server.txt
COPY LICENSE README.md pyproject.toml ./
COPY client client
COPY app app
RUN uv pip install --system --no-cache --no-deps ./client . && python -m compileall -q "$(python -c 'import h5feed_server, os; print(os.path.dirname(h5feed_server.__file__))')"

USER h5feed
WORKDIR /
ENV H5FEED_HOST=0.0.0.0 H5FEED_PORT=8000 H5FEED_CACHE_DIR=/cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["h5feed-server"]
CMD ["serve", "/data"]
