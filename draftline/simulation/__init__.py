"""The engine's scheduler against costs of machines that are not here: roofline and published curves; numpy only."""
