"""Results for people to read: tables, plots, pages."""
