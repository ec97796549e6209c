"""The maths: schedules, objectives, samplers, guidance and the random numbers under them."""
