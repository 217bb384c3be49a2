"""The conformance kit: is a backend right, and how far? See docs/conformance.md. Importing this loads no torch."""

KIT_VERSION = "1.3"
