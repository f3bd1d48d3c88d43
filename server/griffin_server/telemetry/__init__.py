"""Metrics, traces and logs, and the HTTP server that shows metrics and readiness."""
