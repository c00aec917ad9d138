"""Wiring: the training DAG, the command line and the embedded platform."""
