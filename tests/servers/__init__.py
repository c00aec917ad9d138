"""Servers that tests start on loopback, as pytest plugins."""
