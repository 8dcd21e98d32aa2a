"""Say how fast: a latency table, a sensitivity table, and the schedule with the least damage."""
