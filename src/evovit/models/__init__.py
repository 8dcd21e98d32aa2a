"""Named models that no host ships."""
