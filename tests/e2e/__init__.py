"""The whole road, for real: every station, MLflow, Ray, HTTP."""
