"""The interfaces that engines, workers and devices implement or call, and the version of all of them together."""

# MAJOR.MINOR. The major number grows when a backend must be changed to keep working; the minor number grows when
# something that a backend may use is added. CHANGELOG.md lists what changed.
VERSION = "2.0"
