"""The decoder and everything that brings weights into it."""
