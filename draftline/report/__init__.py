"""The report: model card, figures and one self-contained page for a trained draft."""
