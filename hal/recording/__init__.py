"""Steps on disk: record them on one device, run them again on another, find where two part. See docs/conformance.md."""
