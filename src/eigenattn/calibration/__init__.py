"""Text to tokens to streamed moments."""
