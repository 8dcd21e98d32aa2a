"""What the run road leaves for people to read: tables, plots, pages."""
