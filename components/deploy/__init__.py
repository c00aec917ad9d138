"""The station ``deploy`` as a KFP component."""
