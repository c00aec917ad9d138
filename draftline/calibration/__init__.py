"""Calibration of confidences: survival, sequential temperature scaling, its measures."""
