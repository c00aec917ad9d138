"""The page at ``/ui``: chat, where each token came from, and live figures."""
