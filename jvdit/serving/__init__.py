"""Serving: an HTTP API and a page before one process that owns the devices."""
