"""Calibration of confidences: maps to survival, their fits, their measures and the choice among them."""
