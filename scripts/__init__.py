"""The longer steps of the Makefile's targets."""
