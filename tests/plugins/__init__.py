"""Pytest plugins that are not about servers."""
