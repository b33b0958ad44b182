"""HTTP requests: connections, servers, retries, deadlines. Nothing here knows what a batch is."""
