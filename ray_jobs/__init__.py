"""Entry points on Ray: ``python -m ray_jobs.NAME request.json result.json``."""
