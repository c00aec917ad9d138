"""Measured comparisons; each prints ratios. See README.md."""
