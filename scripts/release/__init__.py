"""What `make version` and `make release` do: one version number, and everything that is published, built and tried out.

Python's standard library alone; docs/releasing.md is the page for people.
"""
