"""The site: from request to reply."""
