"""Steps on disk: record them on one device, run them on another, find where two devices differ. See
docs/conformance.md.
"""
