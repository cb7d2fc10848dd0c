"""Training: members, calibration, baseline."""
