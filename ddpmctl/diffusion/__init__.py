"""Schedules, objectives, samplers, guidance and random numbers."""
