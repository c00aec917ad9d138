"""The station ``responses`` as a KFP component."""
