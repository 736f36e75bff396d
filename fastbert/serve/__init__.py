"""An HTTP server for vectors, classes, tags and scores, with the routes that clients of others know (an extra)."""
