"""Schedules for a target speed: a latency table, a sensitivity table, and the search for the least damage."""
