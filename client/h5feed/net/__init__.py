"""Requests and their answers: connections, servers, retries, deadlines. Nothing here knows what a batch is."""
