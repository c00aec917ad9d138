"""Draftline's tests."""
