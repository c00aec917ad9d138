"""Evaluation: what is measured, on which suites, and how."""
