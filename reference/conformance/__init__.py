"""The conformance kit: checks a port against recorded vectors, and names the law that broke."""
