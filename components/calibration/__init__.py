"""The station ``calibration`` as a KFP component."""
